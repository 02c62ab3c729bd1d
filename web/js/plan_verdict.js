// Colours a Plan Memory node by its verdict: green fits, amber fits with a risk of swapping, red does not fit.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const COLORS = {
  "fits": { color: "#1f4d36", bgcolor: "#163527" },
  "swap risk": { color: "#6b4e12", bgcolor: "#4a370f" },
  "does not fit": { color: "#6e2226", bgcolor: "#4c191c" },
};

/** Give the node that was executed the colour of its verdict. */
function paint({ detail }) {
  const colors = COLORS[detail.output?.verdict?.[0]];
  const node = colors && app.graph.getNodeById(detail.display_node ?? detail.node);
  if (!node) return;
  Object.assign(node, colors);
  node.setDirtyCanvas?.(true, true);
}

app.registerExtension({
  name: "AppleSiliconVideo.PlanVerdict",
  setup() {
    api.addEventListener("executed", paint);
  },
});
