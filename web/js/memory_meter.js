// A live memory meter for the front end: what the MPS allocator holds against the recommended working set, tensors and
// swap. Off until it is switched on in the settings; asks the server only while it can be seen.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const SETTING = "AppleSiliconVideo.MemoryMeter";
const ROUTE = "/apple_silicon_video/memory";
const PERIOD = 2000; // ms
const GIB = 2 ** 30;

// Share of the limit from which a colour holds, the highest first.
const COLORS = [
  [1.0, "#e5484d"],
  [0.8, "#f5a623"],
  [0.0, "#30a46c"],
];

const STYLE = `
  .asv-memory-meter { position: fixed; left: 50%; bottom: 14px; transform: translateX(-50%); z-index: 900;
    display: flex; gap: 12px; align-items: center; padding: 5px 12px; border-radius: 8px; pointer-events: none;
    font: 12px/1.4 system-ui, sans-serif; font-variant-numeric: tabular-nums;
    color: var(--input-text, #ddd); background: var(--comfy-menu-bg, #353535);
    border: 1px solid var(--border-color, #4e4e4e); }
  .asv-memory-meter[hidden] { display: none; }
  .asv-memory-meter .bar { width: 120px; height: 6px; border-radius: 3px; overflow: hidden;
    background: var(--comfy-input-bg, #222); }
  .asv-memory-meter .bar > div { height: 100%; width: 0; }
`;

const gib = (bytes) => `${(bytes / GIB).toFixed(1)} GiB`;

/** What is shown for the server's figures: share of the limit (null if there is none) and the texts. */
export function describe(figures) {
  const used = figures.driver ?? figures.process;
  const limit = figures.recommended ?? figures.total;
  const share = used != null && limit ? used / limit : null;
  const texts = [];
  if (used != null) texts.push(`${figures.driver != null ? "MPS" : "Process"} ${gib(used)}${limit ? ` of ${gib(limit)}` : ""}`);
  if (figures.live != null) texts.push(`tensors ${gib(figures.live)}`);
  if (figures.swap != null) texts.push(`swap ${gib(figures.swap)}`);
  return { share, texts };
}

class MemoryMeter {
  constructor() {
    this.wanted = false;
    this.timer = null;
    this.element = null;
  }

  /** Switch on or off, as the setting says. */
  show(wanted) {
    this.wanted = wanted;
    this.update();
  }

  /** Begin or end polling, by whether the meter is wanted and the window visible. */
  update() {
    const visible = this.wanted && !document.hidden;
    if (this.wanted && !this.element) this.build();
    if (this.element) this.element.hidden = !this.wanted;
    if (visible && this.timer === null) {
      this.timer = setInterval(() => this.refresh(), PERIOD);
      this.refresh();
    } else if (!visible && this.timer !== null) {
      clearInterval(this.timer);
      this.timer = null;
    }
  }

  build() {
    const style = document.createElement("style");
    style.textContent = STYLE;
    document.head.append(style);
    this.element = document.createElement("div");
    this.element.className = "asv-memory-meter";
    const bar = document.createElement("div");
    bar.className = "bar";
    this.level = document.createElement("div");
    bar.append(this.level);
    this.text = document.createElement("span");
    this.element.append(bar, this.text);
    document.body.append(this.element);
  }

  async refresh() {
    let figures;
    try {
      const response = await api.fetchApi(ROUTE);
      if (!response.ok) return;
      figures = await response.json();
    } catch {
      return; // the server is restarting; the next call may succeed
    }
    const { share, texts } = describe(figures);
    this.text.textContent = texts.join(" · ");
    this.level.style.width = `${Math.min(1, share ?? 0) * 100}%`;
    this.level.style.background = COLORS.find(([from]) => (share ?? 0) >= from)[1];
  }
}

const meter = new MemoryMeter();

app.registerExtension({
  name: "AppleSiliconVideo.MemoryMeter",
  settings: [
    {
      id: SETTING,
      name: "Show a live memory meter",
      tooltip: "What the MPS allocator holds against the recommended working set, tensors, and swap, every 2 seconds.",
      category: ["Apple Silicon Video", "Memory", "Meter"],
      type: "boolean",
      defaultValue: false,
      onChange: (value) => meter.show(Boolean(value)),
    },
  ],
  setup() {
    document.addEventListener("visibilitychange", () => meter.update());
  },
});
