// The curves, drawn by uPlot; one cursor goes through all of them.

import { byId, color, empty, percent, short } from "./dom.js";

const SYNC = uPlot.sync("step");
const DASHES = [[], [], [], [], [6, 3], [6, 3], [6, 3], [2, 3], [2, 3]];
export const colorOf = (place) => color(`--c${place}`);

const FONT = '11px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif';

function axis(extra = {}) {
  return {
    stroke: color("--muted"),
    font: FONT,
    grid: { stroke: color("--line"), width: 1 },
    ticks: { stroke: color("--line"), width: 1, size: 4 },
    gap: 4,
    ...extra,
  };
}

const stepAxis = () => axis({
  size: 26,
  space: 70,
  grid: { show: false },
  values: (_, steps) => steps.map((step) => (Number.isInteger(step) ? shortStep(step) : "")),
});

function shortStep(step) {
  if (step >= 10000) return `${+(step / 1000).toFixed(1)}k`;
  return String(step);
}

/** A chart that is made anew when its series or the colours change, and else only gets new data. */
class Chart {
  constructor(id, { nothing, label, ...options }) {
    this.place = byId(id);
    this.options = options;
    this.key = "";
    this.plot = null;
    this.note = empty(nothing);
    this.place.append(this.note);
    this.place.setAttribute("role", "img");
    this.place.setAttribute("aria-label", label);
    new ResizeObserver(() => this.fit()).observe(this.place);
  }

  fit() {
    const { clientWidth: width, clientHeight: height } = this.place;
    if (this.plot && width) this.plot.setSize({ width, height });
  }

  show(key, data) {
    const isEmpty = !data[0].length || data.slice(1).every((curve) => curve.every((value) => value === null));
    this.note.hidden = !isEmpty;
    this.note.style.display = isEmpty ? "" : "none";
    if (!this.plot || key !== this.key) this.build(key, data);
    else this.plot.setData(data);
  }

  say(nothing) {
    this.note.textContent = nothing;
  }

  build(key, data) {
    const { onPick, onMove, onRange, onHold, series, axes, scales } = this.options;
    if (this.plot) this.plot.destroy();
    this.key = key;
    this.plot = new uPlot(
      {
        width: this.place.clientWidth || 300,
        height: this.place.clientHeight || 190,
        padding: [8, 10, 0, 0],
        legend: { show: false },
        cursor: { sync: { key: SYNC.key, setSeries: false, filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } }, drag: { x: true, y: false, setScale: false, dist: 6 }, points: { show: false }, y: false },
        scales: { x: { time: false }, ...scales },
        axes: [stepAxis(), ...axes()],
        series: [{}, ...series(data.length - 1)],
        hooks: {
          setCursor: [(plot) => onMove(plot.cursor.idx === null || plot.cursor.idx === undefined ? null : plot.data[0][plot.cursor.idx])],
          setSelect: [(plot) => {
            const { left, width } = plot.select;
            if (!width) return;
            plot.setSelect({ left: 0, width: 0 }, false);
            const [first, last] = [left, left + width].map((at) => Math.round(plot.posToVal(at, "x")));
            onRange(first, last - first + 1);
          }],
        },
      },
      data,
      this.place,
    );
    this.plot.over.addEventListener("mousedown", () => onHold(true));
    this.plot.over.addEventListener("click", () => {
      const { idx } = this.plot.cursor;
      if (idx !== null && idx !== undefined) onPick(this.plot.data[0][idx]);
    });
  }

  /** Put the cursor of all charts at a step; null: nowhere. */
  point(step) {
    if (!this.plot) return;
    const left = step === null ? -10 : this.plot.valToPos(step, "x");
    this.plot.setCursor({ left, top: step === null ? -10 : 10 }, false);
  }
}

const range = (low, high) => (_, min, max) => {
  if (min === null || max === null) return [0, 1];
  const room = (max - min || Math.abs(max) || 1) * 0.06;
  return [low ?? min - room, high ?? max + room];
};

function lines(count) {
  return Array.from({ length: count }, (_, place) => ({
    stroke: colorOf(place),
    width: 1.5,
    dash: DASHES[place],
    spanGaps: true,
    points: { show: false },
  }));
}

function areas(count) {
  // The first is the whole, and shows where the others are; then the drawn ones from the top down.
  return Array.from({ length: count }, (_, place) => {
    const tint = place === 0 ? color("--other") : colorOf(count - 1 - place);
    return { stroke: tint, fill: tint, width: 0.5, points: { show: false } };
  });
}

export function makeCharts(store, listeners) {
  let isHeld = false; // somebody drags over a chart, which must not change beneath
  const hold = (isDown) => {
    isHeld = isDown;
    if (!isDown) draw();
  };
  addEventListener("mouseup", () => isHeld && hold(false));
  const common = { ...listeners, onHold: hold };
  let shares = "planned";
  const mixture = new Chart("c-mixture", {
    ...common,
    label: "Stacked areas: share of each domain over the steps of the run. Values are in the table beside it.",
    nothing: "No step has been reported yet.",
    series: areas,
    scales: { y: { range: () => [0, store.topOf(shares)] } },
    axes: () => [axis({ size: 44, values: (_, ticks) => ticks.map((tick) => percent(tick, 0)) })],
  });
  const loss = new Chart("c-loss", {
    ...common,
    label: "Lines: loss of the drawn domains in nats a token over the steps.",
    nothing: "No loss has been reported yet.",
    series: lines,
    scales: { y: { range: range(null, null) } },
    axes: () => [axis({ size: 44 })],
  });
  const reward = new Chart("c-reward", {
    ...common,
    label: "Lines: alignment reward of the drawn domains over the steps.",
    nothing: "No step with gradients yet. Policies that need none have the trainers measure none.",
    series: lines,
    scales: { y: { range: range(null, null) } },
    axes: () => [axis({ size: 44 })],
  });
  const speed = new Chart("c-speed", {
    ...common,
    label: "Lines: tokens a second and share of the step spent waiting for data over the steps.",
    nothing: "No step has been reported yet.",
    series: () => [
      { stroke: colorOf(0), width: 1.5, points: { show: false } },
      { stroke: colorOf(3), width: 1.5, dash: [6, 3], scale: "wait", points: { show: false } },
    ],
    scales: { y: { range: range(0, null) }, wait: { range: (_, min, max) => [0, Math.max(0.1, Math.min(1, (max ?? 0) * 1.1))] } },
    axes: () => [
      axis({ size: 50, stroke: colorOf(0), values: (_, ticks) => ticks.map(short) }),
      axis({ scale: "wait", side: 1, size: 44, stroke: colorOf(3), grid: { show: false }, values: (_, ticks) => ticks.map((tick) => percent(tick, 0)) }),
    ],
  });
  const all = [mixture, loss, reward, speed];
  let theme = 0;
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    theme += 1;
    draw();
  });

  function draw() {
    const { steps, curves, scalars } = store.shown;
    if (isHeld || store.drawn === null || !curves.planned) return;
    const key = `${store.drawn.join()}|${theme}`;
    mixture.show(key, [steps, ...store.stacked(shares)]);
    loss.show(key, [steps, ...curves.loss]);
    reward.show(key, [steps, ...curves.reward]);
    speed.show(`${theme}`, [steps, scalars.tokens_per_s, scalars.data_wait_share]);
  }

  return {
    draw,
    choose(kind) {
      shares = kind;
      draw();
    },
    point: (step) => all.forEach((chart) => chart.point(step)),
    saysNoReward: (text) => reward.say(text),
  };
}
