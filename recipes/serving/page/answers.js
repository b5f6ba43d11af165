// -- answers ----------------------------------------------------------------------------------------------------

function steering() {
  return vectors.map((vector) => vector.read()).filter((one) => one.strength !== 0);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    buffer += value;
    const lines = buffer.split("\n\n");
    buffer = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
  }
}

async function answer(side) {
  if (running[side]) running[side].abort();
  const control = new AbortController(), signal = control.signal;
  const text = element(`${side}-text`), state = element(`${side}-state`);
  const prompt = element("prompt").value;
  const asked = {
    model: "base", stream: true, max_tokens: Number(element("tokens").value), seed: Number(element("seed").value),
    temperature: Number(element("temperature").value), steering: side === "base" ? [] : steering(),
    ...(chat ? {messages: [{role: "user", content: prompt}]} : {prompt}),
    monitors: monitors.map((one) => one.id),
  };
  const current = running[side] = {abort: () => control.abort(), signal, prompt, asked, text: "", complete: false};
  comparable();
  const started = performance.now();
  state.textContent = "waiting";
  text.setAttribute("aria-busy", "true");
  try {
    const response = await fetch(chat ? "/v1/chat/completions" : "/v1/completions",
      {method: "POST", headers: headers(), body: JSON.stringify(asked), signal});
    if (!response.ok) throw new Error((await response.json()).error.message);
    text.textContent = "";
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      const piece = (chat ? choice.delta.content : choice.text) || "";
      text.append(piece);
      current.text += piece;
      state.textContent = "answering";
      if (choice.finish_reason) {
        const seconds = ((performance.now() - started) / 1000).toFixed(1);
        state.textContent = [`${choice.finish_reason}, ${seconds} s`, ...verdicts(choice.monitors || {})].join(" · ");
      }
    }
    current.complete = true;
    element("error").textContent = "";
    comparable();
    await examine(side).catch((error) => { if (!signal.aborted) element("error").textContent = error.message; });
  } catch (error) {
    if (signal.aborted) return;
    state.textContent = "no answer";
    element("error").textContent = error.message;
  } finally {
    if (running[side] === current) text.setAttribute("aria-busy", "false");
  }
}

// the monitors' scores of a whole answer, as texts
function verdicts(scores) {
  return Object.entries(scores).map(([name, {score, flagged}]) =>
    `${name} ${score === null ? "not read" : score.toFixed(2)}${flagged ? ", flagged" : ""}`);
}

function later() {
  clearTimeout(timer);
  measure();
  timer = setTimeout(() => { remember(); answer("steered"); }, WAIT);
}

// the URL holds the prompt and strengths, so that it can be saved or shared
function remember() {
  const words = new URLSearchParams({prompt: element("prompt").value});
  for (const one of steering()) words.set(one.vector, one.strength);
  history.replaceState(null, "", `#${words}`);
}

async function start() {
  try {
    const models = await get("/v1/models");
    monitors = await get("/v1/monitors");
    element("model").textContent = models[0].id;
    chat = models[0].chat;
    const kinds = monitors.map((one) => make("option", {value: one.id, textContent: `monitor ${one.id}`}));
    element("colour").append(...kinds.filter((one) => !element("colour").querySelector(`[value="${one.value}"]`)));
    const words = new URLSearchParams(location.hash.slice(1));
    if (words.has("prompt")) element("prompt").value = words.get("prompt");
    await sliders((served) => words.has("prompt") || !served.length ?
      Object.fromEntries([...words].map(([name, value]) => [name, Number(value)])) : {[served[0].id]: 1});
    measure();
    element("error").textContent = "";
    if (words.has("prompt")) { answer("base"); answer("steered"); }
  } catch (error) {
    element("error").textContent = error.message;
  }
}

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  remember();
  answer("base");
  answer("steered");
});
element("key").addEventListener("change", start);
