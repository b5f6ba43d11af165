// Everything that comes from the server or the user is set as text, never as markup.
const element = (id) => document.getElementById(id);
const LARGEST = 4, WAIT = 350;  // largest value of a slider; milliseconds to wait after the last change
let vectors = [], monitors = [], chat = true, timer = null;
const running = {base: null, steered: null};

function headers() {
  const key = element("key").value;
  return {"Content-Type": "application/json", ...(key ? {Authorization: `Bearer ${key}`} : {})};
}

async function get(path) {
  const response = await fetch(path, {headers: headers()});
  if (response.status === 401) element("key-label").hidden = false;
  const body = await response.json();
  if (!response.ok) throw new Error(body.error.message);
  return body.data;
}

// -- the sliders ------------------------------------------------------------------------------------------------

function make(kind, properties = {}, ...children) {
  const made = Object.assign(document.createElement(kind), properties);
  made.append(...children);
  return made;
}

function costText(vector, strength) {
  const points = measuredOf(vector, "kl");
  if (strength === 0) return "Not used.";
  if (!points.length) return "The cost of strength was not measured.";
  const kl = (value) => `${value.toFixed(2)} nats per token`, value = between(points, strength);
  if (value !== undefined) return `KL to the base model about ${kl(value)}, on neutral text, according to its file.`;
  const [at, nearest] = strength > 0 ? points.at(-1) : points[0];
  return `Outside the measured range. At strength ${at}: KL to the base model ${kl(nearest)}, on neutral text.`;
}

function row(vector, strength) {
  const id = `strength-${vector.id}`;
  const slider = make("input", {type: "range", id, min: -LARGEST, max: LARGEST, step: 0.1, value: strength});
  const number = make("input", {type: "number", step: 0.1, value: strength});
  number.setAttribute("aria-label", `Strength of ${vector.id} as a number`);
  const positions = make("select", {}, make("option", {value: "", textContent: `made for ${vector.positions}`}),
    ...["all", "completion", "prompt", "last_prompt"].map((at) => make("option", {value: at, textContent: at})));
  positions.setAttribute("aria-label", `Positions of ${vector.id}`);
  const cost = make("p", {className: "cost", id: `cost-${vector.id}`});
  const curve = curveOf(vector);
  slider.setAttribute("aria-describedby", cost.id);
  const show = () => {
    cost.textContent = costText(vector, Number(number.value));
    curve.mark(Number(number.value));
  };
  const changed = (from, to) => () => { to.value = from.value; show(); later(); };
  slider.addEventListener("input", changed(slider, number));
  number.addEventListener("input", changed(number, slider));
  positions.addEventListener("change", later);
  show();
  vector.read = () => ({vector: vector.id, strength: Number(number.value),
    ...(positions.value ? {positions: positions.value} : {})});
  return make("div", {className: "vector"}, make("label", {htmlFor: id, textContent: vector.id}), slider, number,
    positions, cost, ...(curve.drawing ? [curve.drawing] : []));
}

function strengths() {
  return Object.fromEntries(vectors.map((vector) => [vector.id, vector.read().strength]));
}

// a row for every vector that is served now; `choose` gives the strength of each
async function sliders(choose) {
  vectors = await get("/v1/vectors");
  const given = choose(vectors);
  element("vectors").replaceChildren(...vectors.map((vector) => row(vector, given[vector.id] || 0)));
  if (!vectors.length) element("vectors").textContent = "No vector is served yet.";
}
