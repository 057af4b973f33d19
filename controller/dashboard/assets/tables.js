// Tables and figures of the present state.

import { byId, count, digits, make, nameOf, number, percent, plain, say, short, table } from "./dom.js";
import { MOST_DRAWN } from "./store.js";

export function swatch(place) {
  const node = make("span", { className: "swatch" });
  node.style.background = place < 0 ? "var(--other)" : `var(--c${place})`;
  return node;
}

/** The drawn domains with their values at the inspected step. */
export class Legend {
  constructor(store) {
    this.store = store;
    this.key = null;
    this.cells = [];
  }

  show(step, kind) {
    const { store } = this;
    const { curves, length } = store.shown;
    if (store.drawn === null || !curves.planned) return;
    if (this.key !== store.drawn.join()) this.build();
    const at = step === null ? length - 1 : store.pointOf(step);
    let sum = 0;
    store.drawn.forEach((_, place) => {
      const share = curves[kind][place]?.[at];
      sum += share ?? 0;
      const [shareCell, lossCell, rewardCell] = this.cells[place];
      say(shareCell, percent(share));
      say(lossCell, number(lastKnown(curves.loss[place], at)));
      say(rewardCell, digits(lastKnown(curves.reward[place], at)));
    });
    if (this.others) say(this.others, percent(Math.max(0, 1 - sum)));
  }

  build() {
    const { store } = this;
    this.key = store.drawn.join();
    this.cells = store.drawn.map(() => [make("td"), make("td"), make("td")]);
    const rows = store.drawn.map((domain, place) => make(
      "tr",
      {},
      make("td", {}, make("span", { className: "cell" }, swatch(place), nameOf(store.run.domains[domain]))),
      ...this.cells[place],
    ));
    const left = store.size - store.drawn.length;
    this.others = null;
    if (left > 0) {
      this.others = make("td");
      const words = `${left} other${left > 1 ? "s" : ""}`;
      rows.push(make("tr", {}, make("td", {}, make("span", { className: "cell" }, swatch(-1), words)), this.others, make("td"), make("td")));
    }
    byId("legend").replaceChildren(...rows);
  }
}

function lastKnown(curve, at) {
  for (let index = at; index >= 0 && index > at - 50; index -= 1) {
    if (curve[index] !== null && curve[index] !== undefined) return curve[index];
  }
  return null;
}

/** All domains; which are drawn is chosen here. */
export class Domains {
  constructor(store, onChoice) {
    this.store = store;
    this.onChoice = onChoice;
    this.rows = [];
    byId("filter").addEventListener("input", () => this.filter());
  }

  build() {
    const { store } = this;
    const order = Array.from(store.run.domains.keys());
    if (store.means) order.sort((a, b) => store.means[0][b] - store.means[0][a]);
    this.rows = order.map((domain) => this.row(domain));
    byId("domains").replaceChildren(...this.rows.map((row) => row.node));
    this.filter();
  }

  row(domain) {
    const name = this.store.run.domains[domain];
    const box = make("input", { type: "checkbox" });
    box.setAttribute("aria-label", `Draw ${name}`);
    box.addEventListener("change", () => this.toggle(domain, box));
    const cells = Array.from({ length: 4 }, () => make("td"));
    const fill = make("i");
    const label = make("div", {}, nameOf(name), make("span", { className: "meter" }, fill));
    return { domain, name, box, cells, fill, node: make("tr", {}, make("td", {}, box), make("td", {}, label), ...cells) };
  }

  toggle(domain, box) {
    const { store } = this;
    const drawn = store.drawn.filter((each) => each !== domain);
    if (box.checked) {
      if (drawn.length >= MOST_DRAWN) drawn.pop();
      drawn.push(domain);
    }
    if (drawn.length) store.drawn = drawn;
    this.onChoice();
  }

  filter() {
    const wanted = byId("filter").value.toLocaleLowerCase();
    let shown = 0;
    for (const row of this.rows) {
      row.node.hidden = !row.name.toLocaleLowerCase().includes(wanted);
      shown += row.node.hidden ? 0 : 1;
    }
    say(byId("domain-count"), `${shown} of ${this.rows.length}`);
  }

  show(mixture, loss) {
    const { store } = this;
    if (!this.rows.length) this.build();
    let worst = 0;
    const [planned, realised] = store.means ?? [null, null];
    let most = 1e-9;
    for (const share of mixture) most = Math.max(most, share);
    for (const row of this.rows) {
      const { domain, cells } = row;
      const isDrawn = store.drawn !== null && store.drawn.includes(domain);
      if (row.box.checked !== isDrawn) row.box.checked = isDrawn;
      say(cells[0], percent(mixture[domain], 2));
      say(cells[1], percent(planned?.[domain], 2));
      say(cells[2], percent(realised?.[domain], 2));
      say(cells[3], number(loss[domain] ?? store.losses[domain]));
      const width = `${((100 * mixture[domain]) / most).toFixed(1)}%`;
      if (row.fill.style.width !== width) row.fill.style.width = width;
      if (planned) worst = Math.max(worst, Math.abs(realised[domain] - planned[domain]));
    }
    say(byId("share-error"), planned ? `Farthest from its plan over the run: ${(100 * worst).toFixed(3)} percentage points.` : "");
  }
}

export function showFacts(status) {
  const figures = [
    ["Tokens/s", short(status.tokens_per_s)],
    ["Data wait", percent(status.data_wait_share), status.data_wait_share > 0.05 ? "warn" : ""],
    ["Decision p50 · p99", `${number(status.decision_ms[0], 1)} · ${number(status.decision_ms[1], 1)}`, "", "ms"],
    ["Ranks", count(status.world_size), "", `gen. ${status.generation}`],
    ["Workers", `${status.num_workers[0]}`, status.num_workers[0] < status.wanted_workers ? "bad" : "", status.wanted_workers ? `of ${status.wanted_workers}` : ""],
    ["Plan", count(status.plan_version), "", `sealed to ${count(status.sealed_through)}`],
    ["Tokens read", short(status.tokens)],
    ["Degraded steps", count(status.degraded_steps), status.degraded_steps ? "warn" : ""],
    ["Quarantined", count(status.num_quarantines), status.num_quarantines ? "warn" : ""],
  ];
  const place = byId("facts");
  if (place.childElementCount !== figures.length) {
    place.replaceChildren(...figures.map(() => make("div", {}, make("dt"), make("dd", {}, make("span"), " ", make("small")))));
  }
  figures.forEach(([title, value, kind, unit], index) => {
    const box = place.children[index];
    box.className = kind ?? "";
    say(box.firstChild, title);
    say(box.lastChild.firstChild, value);
    say(box.lastChild.lastChild, unit ?? "");
  });
}

export function showBanner(status) {
  const alerts = [];
  const add = (kind, head, text) => alerts.push([kind, head, text]);
  if (status.ledger_fault) add("bad", "Not deciding.", `The ledger cannot be written: ${status.ledger_fault}. Training goes on with the last plan.`);
  const lost = status.workers.filter((worker) => worker.state === "lost").length;
  if (status.num_workers[0] === 0 && status.num_workers[1]) add("bad", "No loader worker is alive.", "Training waits for data until one is back.");
  else if (lost && status.num_workers[0] < status.wanted_workers) add("warn", "Lost workers.", `${lost} lost, ${status.num_workers[0]} of ${status.wanted_workers} wanted ones alive; the others serve the lanes.`);
  if (status.degraded_steps) add("warn", "Degraded.", `${count(status.degraded_steps)} steps went on with an older plan than they should have had.`);
  if (status.missing_reports) add("warn", "Missing reports.", `${count(status.missing_reports)} reports of ranks did not come in time; decisions were made without them.`);
  if (status.held_decisions) add("warn", "Held.", `${count(status.held_decisions)} times the policy gave nothing usable and the mixture in force was held.`);
  if (status.frozen) add("warn", "Operator at the wheel.", "The mixture is frozen or set by hand: the policy does not act until Resume.");
  if (status.phase === "drained") add("good", "Drained.", "The run is over: nothing more is decided.");
  if (status.phase === "waiting") add("good", "Waiting for ranks.", "Training begins when all ranks of a generation have joined.");
  const place = byId("banner");
  if (!isNew(place, alerts)) return;
  place.replaceChildren(...alerts.map(([kind, head, text]) => make("p", { className: `alert ${kind}` }, make("b", {}, head), text)));
}

/** Say whether what a place shows has changed; what has not is left alone, focus and all. */
function isNew(place, ...shown) {
  const key = JSON.stringify(shown);
  if (place.dataset.key === key) return false;
  place.dataset.key = key;
  return true;
}

const bytes = (value) => (value ? `${short(value)}B` : "0 B");

export function showLists(status, domains) {
  if (isNew(byId("ranks"), status.ranks)) showRanks(status.ranks);
  if (isNew(byId("workers"), status.workers, status.lanes_moved)) showWorkers(status);
  if (isNew(byId("shadows"), status.shadows, status.plan_version)) showShadows(status, domains);
  if (isNew(byId("quarantine"), status.num_quarantines)) showQuarantine(status);
  if (isNew(byId("events"), status.events)) showEvents(status.events);
}

function showRanks(ranks) {
  const rest = ranks.count - ranks.rows.length;
  say(byId("ranks-note"), rest > 0 ? `The ${ranks.rows.length} that wait most, of ${count(ranks.count)}` : "Recent steps");
  table(byId("ranks"), {
    caption: "Ranks",
    columns: [["Rank", "left"], ["Tokens/s"], ["Data wait"], ["Step"]],
    rows: ranks.rows.map(([rank, speed, wait, seconds]) => [
      String(rank),
      short(speed),
      wait > 0.05 ? make("span", { className: "tag warn" }, percent(wait)) : percent(wait),
      seconds < 1 ? `${(1000 * seconds).toFixed(0)} ms` : `${seconds.toFixed(2)} s`,
    ]),
    nothing: "No rank has reported a step yet.",
  });
}

function showWorkers(status) {
  say(byId("workers-note"), `${status.num_workers[0]} alive, ${count(status.lanes_moved)} lanes moved`);
  const kinds = { serving: "good", leaving: "warn", silent: "warn", lost: "bad" };
  table(byId("workers"), {
    caption: "Loader workers",
    columns: [["Worker", "left"], ["State"], ["Lanes"], ["Cache"], ["Stalled"], ["Sequences"]],
    rows: status.workers.map((worker) => [
      nameOf(worker.id),
      make("span", { className: `tag ${kinds[worker.state]}` }, worker.state),
      String(worker.lanes),
      bytes(worker.cache_bytes),
      `${number(worker.stall_s, 1)} s`,
      short(worker.sequences),
    ]),
    nothing: "No loader worker has enlisted yet.",
  });
}

function showShadows(status, domains) {
  table(byId("shadows"), {
    caption: "Shadow policies",
    columns: [["Policy", "left"], ["Phase"], ["Would move"], ["Its largest share", "left"]],
    rows: status.shadows.map((shadow) => shadowRow(shadow, status.mixture, domains)),
    nothing: "None. Policies under `shadows:` in the run file see all and act never.",
  });
}

function showQuarantine(status) {
  const more = status.num_quarantines - status.quarantines.length;
  say(byId("quarantine-note"), more > 0 ? `The newest ${status.quarantines.length} of ${count(status.num_quarantines)}` : "Data that could not be read");
  table(byId("quarantine"), {
    caption: "Quarantine",
    columns: [["Domain", "left"], ["Shard", "wrap"], ["Sample"], ["Reason", "wrap"]],
    rows: status.quarantines.map(([domain, shard, sample, reason]) => [nameOf(domain), plain(shard), sample >= 0 ? count(sample) : "all", plain(reason)]).reverse(),
    nothing: "Nothing: every shard and sample was readable so far.",
  });
}

function showEvents(events) {
  table(byId("events"), {
    caption: "Events",
    columns: [["Time", "left"], ["Step"], ["What", "wrap"]],
    rows: events.map((event) => [
      new Date(1000 * event.time_s).toLocaleTimeString([], { hour12: false }),
      event.step >= 0 ? count(event.step) : "",
      plain(event.details ? `${event.event}: ${event.details}` : event.event),
    ]).reverse(),
    nothing: "Nothing has happened yet.",
  });
}

function shadowRow(shadow, mixture, domains) {
  if (!shadow.shares.length) {
    return [nameOf(shadow.name), shadow.phase || "–", "–", shadow.fault ? make("span", { className: "tag bad" }, shadow.fault) : "nothing proposed"];
  }
  let moved = 0;
  let top = 0;
  shadow.shares.forEach((share, index) => {
    moved += Math.abs(share - mixture[index]) / 2;
    if (share > shadow.shares[top]) top = index;
  });
  return [nameOf(shadow.name), shadow.phase || "–", percent(moved), make("span", { className: "cell" }, nameOf(domains[top]), ` ${percent(shadow.shares[top])}`)];
}
