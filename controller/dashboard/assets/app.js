// The page: listens to the controller, keeps what it hears, shows it.

import { ask, byId, count, say } from "./dom.js";
import { makeCharts } from "./charts.js";
import { Decision } from "./decision.js";
import { Heat } from "./heat.js";
import { makeSteering } from "./steer.js";
import { Store } from "./store.js";
import { Domains, Legend, showBanner, showFacts, showLists } from "./tables.js";
import { Zoom } from "./zoom.js";

const RETRY_MS = 2000;

async function begin() {
  const run = await ask("/api/run");
  document.title = `${run.run} · Headrace`;
  say(byId("run-name"), run.run);
  say(byId("step-all"), count(run.num_steps));
  byId("progress").max = run.num_steps;
  byId("step-number").max = run.num_steps - 1;
  byId("logout").hidden = !run.has_session;
  new Page(run).follow();
}

class Page {
  constructor(run) {
    this.run = run;
    this.store = new Store(run);
    this.status = null;
    this.events = null;
    this.inspected = null; // a step; null: the newest
    this.hovered = null;
    this.kind = "planned";
    this.isDue = false;
    this.decision = new Decision(run.domains);
    this.heat = new Heat(run.domains);
    this.legend = new Legend(this.store);
    this.domains = new Domains(this.store, () => this.reload());
    this.zoom = new Zoom(this.store, { middle: () => this.inspected, onChange: () => this.reload() });
    this.charts = makeCharts(this.store, {
      onRange: (first, width) => this.zoom.show(first, width),
      onPick: (step) => this.inspect(step),
      onMove: (step) => {
        if (step === this.hovered) return;
        this.hovered = step;
        this.legend.show(this.step, this.kind);
      },
    });
    if (run.may_steer) makeSteering(run.domains, () => this.status?.mixture ?? []);
    this.bind();
  }

  get step() {
    return this.hovered ?? this.inspected;
  }

  bind() {
    for (const box of document.querySelectorAll('input[name="shares"]')) {
      box.addEventListener("change", () => {
        this.kind = box.value;
        this.charts.choose(this.kind);
        this.legend.show(this.step, this.kind);
      });
    }
    const scrub = byId("scrub");
    scrub.addEventListener("input", () => {
      this.inspected = Number(scrub.value);
      this.mark();
    });
    scrub.addEventListener("change", () => this.inspect(Number(scrub.value)));
    byId("latest").addEventListener("click", () => {
      this.inspected = null;
      this.charts.point(null);
      this.mark();
      if (this.store.newestStep >= 0) this.decision.show(this.store.newestStep);
    });
  }

  inspect(step) {
    this.inspected = step;
    this.mark();
    this.decision.show(step);
  }

  mark() {
    const scrub = byId("scrub");
    if (this.inspected !== null) {
      scrub.value = this.inspected;
      this.charts.point(this.inspected);
    } else scrub.value = scrub.max;
    say(byId("scrub-step"), this.inspected === null ? "latest" : count(this.inspected));
    this.legend.show(this.step, this.kind);
  }

  /** Hear the controller while the page is seen: a browser has six connections to spare, for all
   * its tabs and the pages that it keeps to go back to. */
  follow() {
    const look = () => {
      if (document.visibilityState === "visible") this.listen();
      else this.rest();
    };
    document.addEventListener("visibilitychange", look);
    addEventListener("pageshow", look);
    addEventListener("pagehide", () => this.rest());
    look();
  }

  rest() {
    this.events?.close();
    this.events = null;
  }

  listen() {
    if (this.events) return;
    const events = new EventSource("/api/events");
    this.events = events;
    events.addEventListener("points", (event) => this.takePoints(JSON.parse(event.data)));
    events.addEventListener("status", (event) => this.takeStatus(JSON.parse(event.data)));
    events.onopen = () => {
      this.store.epoch = -1; // what happened meanwhile is asked for
      this.tellLive(true);
    };
    events.onerror = () => {
      this.tellLive(false);
      if (events.readyState !== EventSource.CLOSED || this.events !== events) return;
      this.events = null;
      setTimeout(() => document.visibilityState === "visible" && this.listen(), RETRY_MS);
    };
  }

  tellLive(isLive) {
    byId("dot").className = isLive ? "dot on" : "dot off";
    say(byId("live-text"), isLive ? "live" : "reconnecting");
  }

  takePoints(told) {
    const first = this.store.newestStep < 0 && told.step >= 0;
    if (this.store.take(told)) this.reload();
    say(byId("step-now"), count(Math.max(0, told.step + 1)));
    byId("progress").value = told.step + 1;
    byId("scrub").max = Math.max(1, told.step);
    if (this.inspected === null) byId("scrub").value = byId("scrub").max;
    const sampled = this.status?.skipped_steps ?? 0;
    const of = told.width > 1 ? `Each point is the mean of ${count(told.width)} steps. ` : "";
    say(byId("sampling"), `${of}${sampled ? `${count(sampled)} steps are not in the curves; all are in the ledger.` : ""}`);
    if (first) this.decision.show(told.step);
    this.heat.follow(told.heat).catch(() => {});
    this.draw();
  }

  takeStatus(status) {
    this.status = status;
    const phase = status.policy_phase ? `, ${status.policy_phase}` : "";
    say(byId("run-policy"), `policy ${status.policy}${phase} · ${status.phase}`);
    showFacts(status);
    showBanner(status);
    showLists(status, this.run.domains);
    this.draw();
  }

  async reload() {
    try {
      await this.store.load();
    } catch {
      return; // the next message asks again
    }
    this.draw();
  }

  /** Draw once for all that came since the last frame. */
  draw() {
    if (this.isDue) return;
    this.isDue = true;
    requestAnimationFrame(() => {
      this.isDue = false;
      this.charts.draw();
      if (this.inspected !== null && this.hovered === null) this.charts.point(this.inspected);
      this.legend.show(this.step, this.kind);
      if (this.status) this.domains.show(this.status.mixture, this.status.loss);
    });
  }
}

begin().catch((error) => {
  say(byId("live-text"), error.message);
  byId("dot").className = "dot off";
});
