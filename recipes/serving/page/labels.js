// -- pairs: this one, not that one ------------------------------------------------------------------------------

const pairs = JSON.parse(sessionStorage.getItem("pairs") || "[]");

function counted() {
  element("pair-count").textContent = pairs.length;
  for (const id of ["undo", "export", "train"]) element(id).disabled = pairs.length === 0;
  sessionStorage.setItem("pairs", JSON.stringify(pairs));
}

// both answers must be complete, and answer the same prompt
function comparable() {
  const done = ["base", "steered"].map((side) => running[side]);
  const ready = done.every((one) => one && one.complete && one.text.trim()) && done[0].prompt === done[1].prompt &&
    done[0].text.trim() !== done[1].text.trim();
  for (const side of ["base", "steered"]) element(`prefer-${side}`).disabled = !ready;
}

function prefer(side) {
  const other = side === "base" ? "steered" : "base";
  pairs.push({prompt: running[side].prompt, chosen: running[side].text.trim(), rejected: running[other].text.trim()});
  counted();
}

for (const side of ["base", "steered"]) element(`prefer-${side}`).addEventListener("click", () => prefer(side));
element("undo").addEventListener("click", () => { pairs.pop(); counted(); });

element("export").addEventListener("click", () => {
  const lines = pairs.map((pair) => JSON.stringify(pair) + "\n").join("");
  const link = make("a", {href: URL.createObjectURL(new Blob([lines], {type: "application/jsonl"})),
    download: "pairs.jsonl"});
  link.click();
  URL.revokeObjectURL(link.href);
});

element("train").addEventListener("click", async () => {
  const name = element("new-name").value.trim();
  element("train").disabled = true;
  element("trained").textContent = "Training …";
  try {
    const made = await post(`/v1/vectors/${encodeURIComponent(name)}/train`, {pairs});
    const before = strengths();
    await sliders(() => ({...before, [made.id]: 1}));
    element("trained").textContent =
      `${made.id} was trained on ${pairs.length} pairs in ${made.seconds.toFixed(1)} s. It has a slider now.`;
    later();
  } catch (error) {
    element("trained").textContent = error.message;
  } finally {
    counted();
  }
});
counted();
