/** The API key: typed once, kept for this tab, or taken from the address as `#key=...`. */

const NAME = "sam3-api-key";
/** Without storage (a browser may refuse it) the key lives as long as the page. */
let remembered = "";

/** @returns {string} empty: there is none */
export function storedKey() {
  try {
    return sessionStorage.getItem(NAME) ?? remembered;
  } catch {
    return remembered;
  }
}

/** @param {string} key */
export function storeKey(key) {
  remembered = key;
  try {
    if (key) sessionStorage.setItem(NAME, key);
    else sessionStorage.removeItem(NAME);
  } catch {
    // It is remembered above.
  }
}

/** Take a key out of the address, so that no history and no screenshot holds it. @returns {boolean} there was one */
export function takeKeyFromAddress() {
  const given = /^#key=(.*)$/su.exec(location.hash)?.[1];
  if (given === undefined) return false;
  history.replaceState(null, "", location.pathname + location.search);
  storeKey(decoded(given).trim());
  return true;
}

/** @param {string} text */
function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // a percent sign of the key itself
  }
}

/** Whether a header can hold the key. @param {string} key */
export function isPossibleKey(key) {
  return /^[\x21-\x7e]+$/u.test(key);
}
