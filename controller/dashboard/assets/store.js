// What the page knows of the run: curves of the drawn domains, and all domains' newest point.

import { ask, unpack } from "./dom.js";

const KINDS = ["planned", "executed", "loss", "reward"];
const SCALARS = ["tokens_per_s", "data_wait_share", "decision_ms", "step_s"];
export const MOST_DRAWN = 9;

const plain = (values) => Array.from(values, (value) => (Number.isFinite(value) ? value : null));

export class Store {
  constructor(run) {
    this.run = run;
    this.size = run.domains.length;
    this.drawn = null; // numbers of domains, at most MOST_DRAWN
    this.epoch = -1;
    this.width = 1;
    this.length = 0;
    this.steps = [];
    this.curves = {}; // kind -> a list for each drawn domain
    this.scalars = {};
    this.newest = null; // kind -> all domains' values in the newest point
    this.losses = new Float32Array(this.size).fill(NaN); // newest known of all domains
    this.means = null; // [planned, executed] of all domains over the run
    this.newestStep = -1;
    this.heatStep = -1;
    this.fetching = null;
    this.wanted = false;
  }

  /** Take in a message of points; return whether the curves must be asked for anew. */
  take(told) {
    this.newestStep = told.step;
    this.heatStep = told.heat;
    if (told.means) {
      const both = unpack(told.means);
      this.means = [both.subarray(0, this.size), both.subarray(this.size)];
    }
    const points = told.points.map(([index, text]) => [index, unpack(text)]);
    for (const [, values] of points) this.newest = this.split(values);
    this.newest?.loss.forEach((loss, domain) => {
      if (Number.isFinite(loss)) this.losses[domain] = loss;
    });
    if (told.epoch !== this.epoch || told.gap || this.drawn === null) return told.length > 0;
    for (const [index, values] of points) this.put(index, values);
    return points.length > 0 && points[0][0] > this.length;
  }

  split(values) {
    return Object.fromEntries(
      KINDS.map((kind, place) => [kind, values.subarray(place * this.size, (place + 1) * this.size)]),
    );
  }

  put(index, values) {
    while (this.length <= index) {
      this.steps.push(this.length * this.width);
      for (const kind of KINDS) for (const curve of this.curves[kind]) curve.push(null);
      for (const name of SCALARS) this.scalars[name].push(null);
      this.length += 1;
    }
    const finite = (value) => (Number.isFinite(value) ? value : null);
    KINDS.forEach((kind, place) => {
      this.drawn.forEach((domain, at) => {
        this.curves[kind][at][index] = finite(values[place * this.size + domain]);
      });
    });
    SCALARS.forEach((name, place) => {
      this.scalars[name][index] = finite(values[KINDS.length * this.size + place]);
    });
  }

  /** Choose the domains with the greatest shares to be drawn. */
  choose() {
    const shares = this.means ? this.means[0] : this.newest.planned;
    const order = Array.from(shares.keys()).sort((a, b) => shares[b] - shares[a]);
    this.drawn = order.slice(0, MOST_DRAWN);
  }

  /** Ask for the curves of the drawn domains; one question at a time, the last one counts. */
  async load() {
    this.wanted = true;
    if (this.fetching) return this.fetching;
    this.fetching = this.loadWanted();
    try {
      await this.fetching;
    } finally {
      this.fetching = null;
    }
    return undefined;
  }

  async loadWanted() {
    while (this.wanted) {
      this.wanted = false;
      if (this.drawn === null) this.choose();
      const asked = [...this.drawn];
      const told = await ask(`/api/series?domains=${asked.join(",")}`);
      this.epoch = told.epoch;
      this.width = told.width;
      this.length = told.length;
      this.steps = Array.from({ length: told.length }, (_, index) => index * told.width);
      for (const kind of KINDS) this.curves[kind] = told[kind].map((text) => plain(unpack(text)));
      for (const name of SCALARS) this.scalars[name] = plain(unpack(told[name]));
      if (asked.join() !== this.drawn.join()) this.wanted = true;
    }
  }

  /** The point that holds a step; null: there is none. */
  pointOf(step) {
    const index = Math.min(Math.floor(step / this.width), this.length - 1);
    return index >= 0 ? index : null;
  }

  /** The upper end of the shares' axis: room for the drawn domains, and the others where they fit. */
  topOf(kind) {
    let most = 0;
    for (let index = 0; index < this.length; index += 1) {
      let sum = 0;
      for (const curve of this.curves[kind]) sum += curve[index] ?? 0;
      most = Math.max(most, sum);
    }
    return most > 0.6 || most === 0 ? 1 : Math.min(1, Math.ceil(most * 1.25 * 20) / 20);
  }

  /** Cumulated shares for stacking, greatest sum first: the others on top, then the drawn ones. */
  stacked(kind) {
    const curves = this.curves[kind];
    const sums = [];
    const running = new Array(this.length).fill(0);
    for (const curve of curves) {
      sums.push(curve.map((value, index) => {
        if (value === null) return null;
        running[index] += value;
        return running[index];
      }));
    }
    const whole = curves.length ? curves[0].map((value) => (value === null ? null : 1)) : [];
    return [whole, ...sums.reverse()];
  }
}
