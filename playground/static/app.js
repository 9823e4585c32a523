/** The page: connects pictures, the key, the concepts, the stage, the downloads and the code. */

import { health, modelInfo, RequestFailed } from "./api.js";
import { BoxEditor } from "./boxes.js";
import { ConceptList } from "./concepts.js";
import { DOWNLOADS, fileNameOf, save } from "./downloads.js";
import { announce, byId, make, setText } from "./elements.js";
import { Finder } from "./finder.js";
import { InstanceList } from "./instances.js";
import { isPossibleKey, storedKey, storeKey, takeKeyFromAddress } from "./key.js";
import { BadPicture, DEFAULT_LIMITS, readPicture, readSample, SAMPLES, sampleUrl } from "./pictures.js";
import { SNIPPETS } from "./snippets.js";
import { Stage } from "./stage.js";
import { State } from "./state.js";

/** @import { ModelInfo } from "./api.js" */
/** @import { Picture } from "./types.js" */

const HEALTH_POLL_MS = 2000;
const COPIED_MS = 1500;

const state = new State();
const finder = new Finder(state, askForKey);
const concepts = new ConceptList(state, () => void finder.find());
new Stage(state);
new InstanceList(state);
new BoxEditor(state);
/** @type {{max_image_bytes: number, max_image_pixels: number}} */
let limits = DEFAULT_LIMITS;
/** Pictures are counted as they are chosen: of two that can be shown, the later one is. */
let chosen = 0;
let newestShown = 0;

showSamples();
connectPictures();
connectConcepts();
connectKey();
connectDownloads();
connectCode();
void showHealth();
state.changed();

function showSamples() {
  const items = SAMPLES.map((sample) => {
    const image = make("img", { src: sampleUrl(sample.name), alt: "", width: 320, height: 180 });
    const button = make("button", { type: "button" }, image, make("span", {}, sample.title));
    button.addEventListener("click", () => void take(() => readSample(sample)));
    return make("li", {}, button);
  });
  byId("samples", HTMLElement).append(...items);
}

function connectPictures() {
  const file = byId("file", HTMLInputElement);
  byId("choose", HTMLElement).addEventListener("click", () => file.click());
  byId("other", HTMLElement).addEventListener("click", () => {
    finder.cancel();
    finder.hideError();
    newestShown = ++chosen; // what is still being read is not wanted any more
    state.setPicture(null);
    requestAnimationFrame(() => byId("choose", HTMLElement).focus());
  });
  file.addEventListener("change", () => {
    takeFiles(file.files);
    file.value = "";
  });
  document.addEventListener("paste", (event) => {
    if (!event.clipboardData?.files.length) return; // text, for a field
    event.preventDefault();
    takeFiles(event.clipboardData.files);
  });
  connectDrop();
}

function connectDrop() {
  const veil = byId("drop-here", HTMLElement);
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    veil.hidden = false;
  });
  document.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) veil.hidden = true;
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    veil.hidden = true;
    takeFiles(event.dataTransfer?.files ?? null);
  });
}

/** The first of the files. @param {FileList | null} files */
function takeFiles(files) {
  const [first] = files ?? [];
  if (first) void take(() => readPicture(first, first.name, limits));
  else finder.showError("That is no file. Save the picture first, then drop the file.");
}

/** Show a picture, once it is read. @param {() => Promise<Picture>} read */
async function take(read) {
  const number = ++chosen;
  finder.cancel();
  finder.hideError();
  try {
    const picture = await read();
    if (number < newestShown) return;
    newestShown = number;
    state.setPicture(picture);
    announce(`Picture ${picture.width} by ${picture.height} px. Now type what to find.`);
    byId("concept", HTMLElement).focus({ preventScroll: true });
  } catch (error) {
    if (!(error instanceof BadPicture)) throw error;
    // A file that cannot be used leaves an earlier choice, shown or still being read, as it is.
    if (number > newestShown) finder.showError(error.message);
  }
}

function connectConcepts() {
  byId("concept-form", HTMLFormElement).addEventListener("submit", (event) => {
    event.preventDefault();
    concepts.takeTyped();
    void finder.find();
  });
  byId("modes", HTMLElement).addEventListener("change", (event) => {
    const { value } = /** @type {HTMLInputElement} */ (event.target);
    state.mode = value === "positive" || value === "negative" ? value : "look";
    state.lit = null;
    state.changed();
  });
  state.onChange(() => {
    for (const input of byId("modes", HTMLElement).querySelectorAll("input")) input.checked = input.value === state.mode;
  });
}

function connectKey() {
  const field = byId("key", HTMLInputElement);
  byId("key-form", HTMLFormElement).addEventListener("submit", (event) => {
    event.preventDefault();
    storeKey(field.value.trim());
    void useKey().then((isKnown) => {
      if (isKnown && state.picture && state.unanswered.length) void finder.find();
    });
  });
  // A key that is typed counts also without the button.
  field.addEventListener("input", () => {
    storeKey(field.value.trim());
    field.removeAttribute("aria-invalid");
  });
  const takeKey = () => {
    takeKeyFromAddress();
    field.value = storedKey();
    if (storedKey()) void useKey();
  };
  addEventListener("hashchange", takeKey);
  takeKey();
}

/** Ask the server about the model; tells whether it knows the key. */
async function useKey() {
  if (!isPossibleKey(storedKey())) {
    askForKey(storedKey() ? "This key has characters that no key has." : "Type the API key first.");
    return false;
  }
  try {
    showModel(await modelInfo(storedKey()));
  } catch (error) {
    if (!(error instanceof RequestFailed)) throw error;
    if (error.status === 401) askForKey("The server does not know this key.");
    return error.status !== 401;
  }
  const help = byId("key-help", HTMLElement);
  help.classList.remove("wrong");
  setText(help, "The server knows this key. It stays in this tab.");
  byId("key", HTMLElement).removeAttribute("aria-invalid");
  return true;
}

/** @param {string} message */
function askForKey(message) {
  const help = byId("key-help", HTMLElement);
  help.classList.add("wrong");
  setText(help, message);
  announce(message);
  const field = byId("key", HTMLInputElement);
  field.setAttribute("aria-invalid", "true");
  field.focus();
  field.select();
}

/** @param {ModelInfo} info */
function showModel(info) {
  limits = info.limits;
  byId("concept", HTMLInputElement).maxLength = info.limits.max_prompt_characters;
  setText(byId("server", HTMLElement), `${info.demo ? "demo checkpoint" : info.checkpoint} · ${info.device} · ${info.model_version}`);
  if (info.demo) showNotice("This server runs the demo checkpoint, which knows coloured shapes and nothing else: try the samples.");
  if (state.answered.length === 0) state.threshold = info.score_threshold;
  state.changed();
}

/** @param {string} text empty: none */
function showNotice(text) {
  const notice = byId("notice", HTMLElement);
  setText(notice, text);
  notice.hidden = text === "";
}

/** Say that the model is loading, until it is loaded. */
async function showHealth() {
  try {
    const { status, detail } = await health();
    if (status === "ok") {
      if (byId("notice", HTMLElement).dataset.loading) {
        delete byId("notice", HTMLElement).dataset.loading;
        showNotice("");
        if (storedKey()) void useKey();
      }
      return;
    }
    byId("notice", HTMLElement).dataset.loading = "yes";
    showNotice(`The model is not ready yet${detail ? `: ${detail}` : ""}.`);
  } catch (error) {
    if (!(error instanceof RequestFailed)) throw error;
    byId("notice", HTMLElement).dataset.loading = "yes";
    showNotice(error.message);
  }
  setTimeout(() => void showHealth(), HEALTH_POLL_MS);
}

function connectDownloads() {
  const section = byId("take", HTMLElement);
  state.onChange(() => {
    section.hidden = state.answered.length === 0;
  });
  for (const button of section.querySelectorAll("button")) {
    button.addEventListener("click", () => void download(button.dataset.download ?? ""));
  }
}

/** @param {string} kind */
async function download(kind) {
  const { picture, shown } = state;
  if (!picture) return;
  const { ending, make: build } = DOWNLOADS[kind];
  const name = fileNameOf(picture, ending);
  save(await build(picture, shown), name);
  announce(`${name} downloaded`);
}

function connectCode() {
  const snippet = byId("snippet", HTMLElement);
  const languages = byId("languages", HTMLElement);
  const copy = byId("copy", HTMLButtonElement);
  const show = () => {
    const { picture, concepts: asked, threshold } = state;
    byId("code", HTMLElement).hidden = !picture || asked.length === 0;
    const language = languages.querySelector("input:checked");
    if (picture && language instanceof HTMLInputElement) setText(snippet, SNIPPETS[language.value](picture, asked, threshold));
  };
  state.onChange(show);
  languages.addEventListener("change", show);
  copy.addEventListener("click", () => {
    void copyText(snippet).then((isCopied) => {
      setText(copy, isCopied ? "Copied" : "Press Ctrl+C");
      announce(isCopied ? "Copied" : "The code is selected; copy it with Ctrl+C");
      setTimeout(() => setText(copy, "Copy"), COPIED_MS);
    });
  });
}

/** Copy an element's text; where the browser refuses it (a page without TLS), select it. @param {HTMLElement} element */
async function copyText(element) {
  try {
    await navigator.clipboard.writeText(element.textContent ?? "");
    return true;
  } catch {
    getSelection()?.selectAllChildren(element);
    return false;
  }
}
