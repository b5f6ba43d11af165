// -- measured effects by strength, with the current point ---------------------------------------------------------

const SVG = document.getElementById("blank").namespaceURI, WIDTH = 400, HEIGHT = 70, LEFT = 28, BOTTOM = 14;

function drawn(kind, attributes, text = "") {
  const made = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

// the values of a measure, by strength
function measuredOf(vector, measure) {
  const measured = (vector.strength || {}).measured || {};
  return Object.entries(measured).filter(([, means]) => measure in means)
    .map(([at, means]) => [Number(at), means[measure]]).sort((one, other) => one[0] - other[0]);
}

// linear interpolation between measured strengths; undefined beyond them
function between(points, at) {
  const above = points.find(([x]) => x >= at), below = points.findLast(([x]) => x <= at);
  if (!above || !below) return undefined;
  const share = above[0] === below[0] ? 0 : (at - below[0]) / (above[0] - below[0]);
  return below[1] + share * (above[1] - below[1]);
}

// KL and, if answers were scored, behaviour against strength
function curveOf(vector) {
  const kl = measuredOf(vector, "kl"), behaviour = measuredOf(vector, "behaviour");
  if (kl.length < 2) return {drawing: null, mark: () => {}};
  const low = kl[0][0], high = kl.at(-1)[0], most = Math.max(...kl.map(([, value]) => value)) || 1;
  const x = (at) => LEFT + (at - low) / (high - low) * (WIDTH - LEFT - 8);
  const y = (share) => 6 + (1 - share) * (HEIGHT - BOTTOM - 6);
  const line = (points, top, kind) => drawn("polyline", {class: kind,
    points: points.map(([at, value]) => `${x(at).toFixed(1)},${y(value / top).toFixed(1)}`).join(" ")});
  const svg = drawn("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img",
    preserveAspectRatio: "xMinYMid meet"});
  const title = drawn("title", {}), point = drawn("circle", {r: 3.5, class: "now"});
  svg.append(title, line(kl, most, "kl"), ...(behaviour.length > 1 ? [line(behaviour, 1, "behaviour")] : []), point,
    drawn("text", {x: 0, y: 12}, most.toFixed(2)), drawn("text", {x: LEFT, y: HEIGHT - 2}, String(low)),
    drawn("text", {x: WIDTH - 8, y: HEIGHT - 2, "text-anchor": "end"},
      `strength ${high} · line: KL${behaviour.length > 1 ? " · dashes: behaviour" : ""}`));
  const mark = (at) => {
    const cost = between(kl, at), shown = between(behaviour, at);
    point.setAttribute("visibility", cost === undefined ? "hidden" : "visible");
    if (cost !== undefined) {
      point.setAttribute("cx", x(at).toFixed(1));
      point.setAttribute("cy", y(cost / most).toFixed(1));
    }
    title.textContent = `Measurements of ${vector.id}, strengths ${low} to ${high}. ` + (cost === undefined ?
      `Strength ${at} is outside this range.` : `At ${at}: KL ${cost.toFixed(2)}` +
      (shown === undefined ? "." : `, behaviour ${shown.toFixed(2)}.`));
  };
  return {drawing: svg, mark};
}
