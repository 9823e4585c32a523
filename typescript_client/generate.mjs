// Prints the types of the API description that it reads from its standard input: `make types`.
import { text } from "node:stream/consumers";
import openapiTS, { astToString, COMMENT_HEADER } from "openapi-typescript";

const description = JSON.parse(await text(process.stdin));
stateRequiredFields(description);
// defaultNonNullable would make a request's fields that have a default required.
const types = await openapiTS(description, { defaultNonNullable: false });
process.stdout.write(COMMENT_HEADER + astToString(types));

/**
 * An object of which one of several fields is required (`anyOf` of `required`): openapi-typescript makes `unknown` of
 * it. This gives each alternative its required fields, and makes an intersection of object and alternatives.
 */
function stateRequiredFields(part) {
  if (typeof part !== "object" || part === null) return;
  Object.values(part).forEach(stateRequiredFields);
  const { properties, anyOf } = part;
  if (!properties || !anyOf?.every((each) => each.required && Object.keys(each).length === 1)) return;
  const alternatives = anyOf.map(({ required }) => ({
    type: "object",
    required,
    properties: Object.fromEntries(required.map((name) => [name, withoutWords(properties[name])])),
  }));
  delete part.anyOf;
  part.oneOf = alternatives;
}

/** Without description and examples, which the object has already. */
function withoutWords({ description, example, examples, ...schema }) {
  return schema;
}
