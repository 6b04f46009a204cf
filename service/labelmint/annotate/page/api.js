// The server of the page, as functions. Every failure is an Error with one sentence for the person, and a `reason`.

export class Trouble extends Error {
  constructor(message, reason) {
    super(message);
    this.reason = reason;
  }
}

async function call(method, path, body) {
  let response;
  try {
    response = await fetch(`api/${path}`, {
      method,
      headers: body === undefined ? {} : { "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch {
    throw new Trouble("The program on this machine does not answer. Is it still running?", "OFFLINE");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Trouble(answer.detail ?? `The program answered ${response.status}.`, answer.reason);
  return answer;
}

export const session = () => call("GET", "session");
export const openImage = (seed) => call("POST", "images", { seed });
export const skipImage = (seed) => call("POST", `images/${seed}/skip`);
export const drawingOf = (seed, kind) => call("GET", `images/${seed}/${kind}`);
export const saveDrawing = (seed, kind, revision, list) => call("PUT", `images/${seed}/${kind}`, { revision, [kind]: list });
export const saveClasses = (classes) => call("PUT", "classes", { classes });
export const regionAt = (seed, preview, at) => call("POST", `images/${seed}/region`, { preview, at });
export const look = (seed, others) => call("POST", "preview", { seed, others });
export const suggestions = (count) => call("GET", `suggestions?count=${count}`);
export const estimate = () => call("GET", "estimate");
export const commands = (job) => call("POST", "commands", job);
export const startJob = (job) => call("POST", "serve", job);
export const jobStatus = () => call("GET", "serve");
export const cancelJob = () => call("DELETE", "serve");
export const writeElsewhere = (format) => call("POST", "elsewhere", { format });
export const imageUrl = (seed) => `api/images/${seed}/image.png`;
export const previewUrl = (preview, seed, name) => `api/preview/${preview}/${seed}/${name}.png`;
