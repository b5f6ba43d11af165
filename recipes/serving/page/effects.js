// -- the effect of steering: KL and perplexity as strength changes, and the colours of tokens ----------------------

let measuring = false, stale = false;

async function post(path, body, signal) {
  const response = await fetch(path, {method: "POST", headers: headers(), body: JSON.stringify(body), signal});
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error.message);
  return answer;
}

// one measurement at a time; if a slider has moved in the meantime, another follows
async function measure() {
  if (measuring) { stale = true; return; }
  measuring = true;
  try {
    do {
      stale = false;
      const {kl, perplexity} = await post("/v1/effects", {steering: steering()});
      const times = (perplexity.steered / perplexity.base).toFixed(2);
      element("effect").textContent = `Now, on neutral text: KL to the base model ${kl.toFixed(3)} nats per token, ` +
        `perplexity ${perplexity.steered.toFixed(1)}, ${times} times the base model's.`;
    } while (stale);
  } catch (error) {
    element("effect").textContent = `KL could not be measured: ${error.message}`;
  } finally {
    measuring = false;
  }
}

// a value scaled to -1 to 1
function shade(kind, token) {
  const value = kind === "change" ? (token.steered - token.base) / 3 : kind === "kl" ? token.kl / 2 :
    (token.monitors[kind] || 0) / 3;
  return Math.max(-1, Math.min(1, value));
}

function words(kind, token) {
  if (kind === "change") return `log-probability ${token.base.toFixed(2)} to ${token.steered.toFixed(2)}`;
  return kind === "kl" ? `KL ${token.kl.toFixed(3)}` : `${kind} ${(token.monitors[kind] ?? NaN).toFixed(2)}`;
}

// red is lower and green is higher; for KL and monitors, red is higher
function colour(kind, token) {
  const value = shade(kind, token), up = kind === "change" ? value >= 0 : value < 0;
  return `rgb(${up ? "40 150 80" : "210 70 50"} / ${(Math.abs(value) * 0.55).toFixed(2)})`;
}

const examined = {base: null, steered: null};

async function examine(side) {
  const asked = running[side].asked, text = running[side].text;
  examined[side] = null;
  if (!text) return;
  // monitors score the base model's tokens with the states of the base model
  const names = monitors.map((one) => one.id);
  const of = {...(chat ? {messages: asked.messages} : {prompt: asked.prompt}), answer: text, monitors: names};
  const {answer} = await post("/v1/effects", {...of, steering: steering()}, running[side].signal);
  if (side === "base" && names.length) {
    const plain = await post("/v1/effects", {...of, steering: []}, running[side].signal);
    answer.forEach((token, i) => { token.monitors = plain.answer[i].monitors; });
  }
  examined[side] = answer;
  paint(side);
}

function paint(side) {
  const kind = element("colour").value, tokens = examined[side];
  if (!tokens) return;
  const spans = tokens.map((token) => {
    const span = make("span", {textContent: token.token});
    if (kind) { span.style.background = colour(kind, token); span.title = words(kind, token); }
    return span;
  });
  element(`${side}-text`).replaceChildren(...spans);
  const names = ["token", "base", "steered", "KL", ...monitors.map((one) => one.id)];
  const values = (token) => [token.base, token.steered, token.kl, ...monitors.map((one) => token.monitors[one.id])];
  const rows = tokens.map((token) => make("tr", {}, make("td", {textContent: token.token}),
    ...values(token).map((value) => make("td", {textContent: value.toFixed(2)}))));
  element(`${side}-tokens`).replaceChildren(make("table", {}, make("thead", {}, make("tr", {},
    ...names.map((name) => make("th", {textContent: name, scope: "col"})))), make("tbody", {}, ...rows)));
}

element("colour").addEventListener("change", () => { paint("base"); paint("steered"); });
