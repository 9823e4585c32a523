/** The request of the page as a command, and as code in Python and TypeScript. */

import { fieldsOf, SEGMENT_URL } from "./api.js";
import { sampleUrl } from "./pictures.js";

/** @import { Concept, Picture } from "./types.js" */

/** @type {Record<string, (picture: Picture, concepts: Concept[], threshold: number) => string>} */
export const SNIPPETS = { curl: curlOf, python: pythonOf, typescript: typescriptOf };

/** One command a concept. @param {Picture} picture @param {Concept[]} concepts @param {number} threshold */
function curlOf(picture, concepts, threshold) {
  const commands = concepts.map((concept) => {
    // --form-string: in other forms a text that begins with @ names a file.
    const fields = fieldsOf(concept.text, concept.boxes, threshold).map(
      ([name, value]) => `--form-string ${shellQuoted(`${name}=${value}`)}`,
    );
    const file = picture.name.replace(/["\\]/gu, "\\$&");
    const lines = [
      `curl -sS ${shellQuoted(SEGMENT_URL)}`,
      '-H "X-API-Key: $SAM3_API_KEY"',
      `-F ${shellQuoted(`image=@"${file}"`)}`,
      ...fields,
    ];
    return lines.join(" \\\n  ");
  });
  const download = picture.isSample ? [`curl -sSO ${shellQuoted(sampleUrl(picture.name))}`] : [];
  return [...download, ...commands].join("\n");
}

/** By the client in sam3_client/. @param {Picture} picture @param {Concept[]} concepts @param {number} threshold */
function pythonOf(picture, concepts, threshold) {
  const texts = concepts.filter((concept) => concept.boxes.length === 0).map((concept) => concept.text);
  const calls = concepts
    .filter((concept) => concept.boxes.length)
    .map(({ text, boxes }) => [
      ...(text === null ? [] : [JSON.stringify(text)]),
      `boxes=${JSON.stringify(boxes.map((box) => box.corners))}`,
      `box_labels=${JSON.stringify(boxes.map((box) => box.label))}`,
    ]);
  if (texts.length) calls.unshift([JSON.stringify(texts)]);
  return [
    "from sam3_client import Client",
    "",
    `with Client(${JSON.stringify(serverUrl())}) as client:  # the key: $SAM3_API_KEY`,
    ...calls.flatMap((options, index) => [
      ...(index ? [""] : []),
      "    result = client.segment(",
      `        ${JSON.stringify(picture.name)},`,
      ...options.map((option) => `        ${option},`),
      `        score_threshold=${threshold},`,
      "    )",
      "    for found in result.instances:",
      "        print(found.label, found.score, found.box)",
    ]),
  ].join("\n");
}

/** By fetch; needs no package. @param {Picture} picture @param {Concept[]} concepts @param {number} threshold */
function typescriptOf(picture, concepts, threshold) {
  const requests = concepts.map((concept) => {
    const fields = fieldsOf(concept.text, concept.boxes, threshold);
    return `  { ${fields.map(([name, value]) => `${name}: ${JSON.stringify(value)}`).join(", ")} },`;
  });
  return [
    'import { readFile } from "node:fs/promises";',
    "",
    `const image = new Blob([await readFile(${JSON.stringify(picture.name)})]);`,
    "const requests = [",
    ...requests,
    "];",
    "for (const fields of requests) {",
    "  const form = new FormData();",
    '  form.set("image", image, "image");',
    "  for (const [name, value] of Object.entries(fields)) form.set(name, value);",
    `  const response = await fetch(${JSON.stringify(SEGMENT_URL)}, {`,
    '    method: "POST",',
    '    headers: { "X-API-Key": process.env.SAM3_API_KEY ?? "" },',
    "    body: form,",
    "  });",
    "  const answer = await response.json();",
    "  if (!response.ok) throw new Error(answer.error.message);",
    "  for (const { box, score } of answer.data) console.log(fields.prompt, score, box);",
    "}",
  ].join("\n");
}

/** Without a slash at its end. */
function serverUrl() {
  return new URL(".", document.baseURI).href.replace(/\/$/u, "");
}

/** One word for a shell, whatever it holds. @param {string} text */
function shellQuoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}
