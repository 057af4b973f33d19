// A decision: what was seen, what the policy proposed, what the guard made of it, and the plan.

import { ask, byId, count, empty, make, nameOf, number, percent, say, table } from "./dom.js";

const MOST_ROWS = 400;

export class Decision {
  constructor(domains) {
    this.domains = domains;
    this.asked = 0;
    byId("choose").addEventListener("submit", (event) => {
      event.preventDefault();
      this.show(Number(byId("step-number").value));
    });
  }

  async show(step) {
    this.asked += 1;
    const mine = this.asked;
    byId("step-number").value = step;
    say(byId("decision-title"), `Step ${count(step)} …`);
    let told = null;
    let fault = "";
    try {
      told = await ask(`/api/steps/${step}`);
    } catch (error) {
      fault = error.message;
    }
    if (mine !== this.asked) return;
    if (told === null) {
      say(byId("decision-title"), `Step ${count(step)}`);
      byId("decision").replaceChildren(empty(fault));
    } else this.tell(told);
  }

  tell(told) {
    const { observation: seen, policy, decision, plan } = told;
    say(byId("decision-title"), `What came of step ${count(told.step)}`);
    const box = (head, ...lines) => make("div", {}, make("b", {}, head), lines.join(" · "));
    const sequences = seen.domains.sequences.reduce((sum, each) => sum + each, 0);
    const seenLines = [`${count(sequences)} sequences`, `generation ${told.generation}`];
    if (seen.missing_ranks) seenLines.push(`without ${seen.missing_ranks} ranks`);
    const target = policy.proposed_step;
    const flow = make(
      "div",
      { className: "flow" },
      box("1 Observation", ...seenLines),
      box("2 Proposal", policy.name ?? "policy", policy.phase || "was not asked", target === null ? "" : `for step ${count(target)}`),
      box("3 Guard", decision.reasons.length ? decision.reasons.join("; ") : "left the proposal as it is", `${number(decision.decision_ms, 1)} ms`),
      box("4 Plan", plan ? `version ${count(plan.version)}` : "none", plan ? `in force from step ${count(plan.first_step)}` : ""),
    );
    const rows = this.domains.map((name, index) => this.row(name, index, told));
    rows.sort((a, b) => b.order - a.order);
    const shadows = Object.keys(told.shadows);
    const place = make("div", { className: "scroll decided", tabIndex: 0, role: "region" });
    place.setAttribute("aria-label", "Shares of this decision");
    table(place, {
      caption: "Decision by domain",
      columns: [["Domain", "left"], ["Sequences"], ["Loss"], ["Planned"], ["Proposed"], ["Decided"], ["Guard"], ...shadows.map((name) => [nameOf(`shadow ${name}`)])],
      rows: rows.slice(0, MOST_ROWS).map((row) => row.cells),
      nothing: "The run has no domains.",
    });
    const figures = Object.entries(policy.diagnostics).map(([name, value]) => `${name.replaceAll("_", " ")} ${Number(value).toPrecision(4)}`);
    byId("decision").replaceChildren(flow, place, make("p", { className: "muted foot" }, figures.join(" · ")));
  }

  row(name, index, told) {
    const seen = told.observation.domains;
    const proposed = told.policy.proposal?.[index] ?? null;
    const decided = told.decision.mixture?.[index] ?? null;
    let change = "";
    if (typeof proposed === "number" && decided !== null && Math.abs(decided - proposed) > 1e-6) {
      const text = `${decided > proposed ? "▲" : "▼"} ${(100 * Math.abs(decided - proposed)).toFixed(2)} pp`;
      change = make("span", { className: decided > proposed ? "up" : "down" }, text);
    }
    const shadows = Object.values(told.shadows).map((shadow) => percent(shadow.proposal?.[index] ?? null, 2));
    return {
      order: decided ?? seen.planned[index],
      cells: [
        nameOf(name),
        count(seen.sequences[index]),
        number(seen.loss[index], 4),
        percent(seen.planned[index], 2),
        typeof proposed === "string" ? proposed : percent(proposed, 2),
        percent(decided, 2),
        change,
        ...shadows,
      ],
    };
  }
}
