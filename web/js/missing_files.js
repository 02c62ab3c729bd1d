// A Download button on this pack's loaders while the file that they name is missing. The front end lists missing files
// itself, from properties.models, but lets only .safetensors and its like be downloaded: a .gguf file has no button there.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const OURS = /^MPS/;
const BUTTON = "download_missing_file";
const SOURCE = "https://huggingface.co/"; // a workflow is anybody's text: no other address is opened for it
const SUFFIX = /\.(gguf|safetensors)$/;
const EXPLAINED = 20000; // ms

const WORDS = {
  en: {
    button: (directory) => `Download for models/${directory}`,
    summary: (name) => `Downloading ${name}`,
    detail: (folder) => `When it is complete, move it to ${folder} and press R.`,
  },
  zh: {
    button: (directory) => `下载（放入 models/${directory}）`,
    summary: (name) => `正在下载 ${name}`,
    detail: (folder) => `下载完成后，把它移到 ${folder}，然后按 R。`,
  },
};

const watched = new WeakSet();

/** What is said, in the front end's language. */
const words = () => (`${app.extensionManager.setting.get("Comfy.Locale")}`.startsWith("zh") ? WORDS.zh : WORDS.en);

/** The file of properties.models that a widget names and no folder has, or undefined. */
function missingFile(node) {
  for (const widget of node.widgets ?? []) {
    if (widget.type !== "combo") continue;
    const known = node.properties?.models?.find?.((file) => file?.name === widget.value);
    const { values } = widget.options ?? {};
    const choices = typeof values === "function" ? values(widget, node) : values;
    if (known && !choices?.includes(known.name)) return known;
  }
}

/** Whether a file may be offered: by its address and its name. */
const allowed = ({ name, url }) => String(url).startsWith(SOURCE) && SUFFIX.test(name);

/** Let the browser download a file, and say where it belongs. */
async function download({ name, url, directory }) {
  const link = document.createElement("a");
  Object.assign(link, { href: url, download: name, target: "_blank", rel: "noopener noreferrer" });
  link.click();
  const folders = (await api.getFolderPaths?.())?.[directory] ?? [];
  const folder = folders.find((path) => path.endsWith(directory)) ?? `models/${directory}`; // ComfyUI has old names too
  const [summary, detail] = [words().summary(name), words().detail(folder)];
  app.extensionManager.toast.add({ severity: "info", summary, detail, life: EXPLAINED });
}

/** Put the button below a loader's widgets; it is no part of what is saved or queued. */
function add(node, directory) {
  const button = node.addWidget("button", BUTTON, null, () => download(missingFile(node)), { serialize: false });
  button.label = words().button(directory);
  button.serialize = false;
  watch(node);
  node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
}

/** Give a loader its button, or take it away when the file is there. */
function update(node) {
  if (!OURS.test(node.type)) return;
  const button = node.widgets?.find((widget) => widget.name === BUTTON);
  const file = missingFile(node);
  const wanted = Boolean(file) && allowed(file);
  if (wanted && !button) add(node, file.directory);
  else if (!wanted && button) node.removeWidget(button);
  node.setDirtyCanvas?.(true, true);
}

/** Update a loader whenever another file is chosen in it. */
function watch(node) {
  if (watched.has(node)) return;
  watched.add(node);
  for (const widget of node.widgets.filter((each) => each.type === "combo")) {
    const { callback } = widget;
    widget.callback = function (...values) {
      const result = callback?.apply(this, values);
      update(node);
      return result;
    };
  }
}

app.registerExtension({
  name: "AppleSiliconVideo.MissingFiles",
  loadedGraphNode: update,
  refreshComboInNodes() {
    app.graph.nodes.forEach(update);
  },
});
