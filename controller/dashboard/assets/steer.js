// What an operator may do: freeze, resume, save the policy, set the mixture by hand.

import { ask, byId, make, nameOf, percent, say } from "./dom.js";

const note = (text) => {
  const place = byId("banner");
  const line = make("p", { className: "alert good" }, text);
  place.append(line);
  setTimeout(() => line.remove(), 6000);
};

async function order(path, words) {
  try {
    const told = await ask(path, {});
    note(words(told));
  } catch (error) {
    note(`Not done: ${error.message}`);
  }
}

/** Let whoever may steer do so. `mixture` gives the shares in force. */
export function makeSteering(domains, mixture) {
  byId("actions").hidden = false;
  byId("freeze").addEventListener("click", () => order("/api/freeze", () => "The mixture is held."));
  byId("resume").addEventListener("click", () => order("/api/resume", () => "The policy decides again."));
  byId("snapshot").addEventListener("click", () => order("/api/snapshot", (told) => `The policy is saved at ${told.path}`));
  byId("override").addEventListener("click", () => open(domains, mixture()));
  byId("steer-cancel").addEventListener("click", () => byId("steer").close());
}

function open(domains, inForce) {
  let guarded = null;
  const rows = domains.map((name, index) => {
    const value = +(100 * (inForce[index] ?? 0)).toFixed(3);
    const box = make("input", { type: "number", min: "0", step: "any", value: String(value) });
    box.setAttribute("aria-label", `Weight of ${name}`);
    const slider = make("input", { type: "range", min: "0", max: "100", step: "0.1", value: String(value), tabIndex: -1 });
    slider.setAttribute("aria-label", `Weight of ${name}, slider`);
    box.addEventListener("input", () => { slider.value = box.value; stale(); });
    slider.addEventListener("input", () => { box.value = slider.value; stale(); });
    const cells = Array.from({ length: 3 }, () => make("td"));
    say(cells[0], percent(inForce[index], 2));
    const node = make("tr", {}, make("td", {}, nameOf(name)), make("td", {}, box), make("td", {}, slider), ...cells);
    return { box, cells, node };
  });
  const apply = byId("steer-apply");
  const within = byId("steer-guarded");
  const say2 = (text) => say(byId("steer-note"), text);

  function stale() {
    apply.disabled = true;
    within.disabled = true;
    rows.forEach(({ cells }) => { say(cells[1], ""); say(cells[2], ""); });
    say2("Preview shows what these weights come to.");
  }

  const weights = () => rows.map(({ box }) => (box.value === "" ? 0 : Number(box.value)));

  byId("steer-preview").onclick = async () => {
    try {
      const told = await ask("/api/preview", { shares: weights() });
      guarded = told.guarded;
      rows.forEach(({ cells }, index) => {
        say(cells[1], percent(told.entered[index], 2));
        say(cells[2], percent(told.guarded[index], 2));
      });
      say2(told.reasons.length ? `The guard would change it: ${told.reasons.join("; ")}` : "The guard would leave it as it is.");
      apply.disabled = false;
      within.disabled = told.held || !told.reasons.length;
    } catch (error) {
      say2(`Not possible: ${error.message}`);
    }
  };
  const set = async (shares) => {
    try {
      const told = await ask("/api/mixture", { shares });
      byId("steer").close();
      note(`The mixture holds from step ${told.first_step} on, until Resume.`);
    } catch (error) {
      say2(`Not done: ${error.message}`);
    }
  };
  apply.onclick = () => set(weights());
  within.onclick = () => set(guarded);
  byId("steer-form").onsubmit = (event) => {
    event.preventDefault();
    byId("steer-preview").click();
  };
  byId("steer-rows").replaceChildren(...rows.map((row) => row.node));
  stale();
  byId("steer").showModal();
}
