// From drawings to a running service: one job of four commands, its progress, and the commands themselves.

import { cancelJob, commands, jobStatus, startJob, writeElsewhere } from "./api.js";
import { $, make, percent } from "./elements.js";

const POLL_MS = 700;
const DOES = { fit: "Fitting the classifiers", export: "Exporting", calibrate: "Calibrating the gate", serve: "Starting the service" };

export class Serving {
  constructor(state) {
    this.state = state;
    $("job").addEventListener("submit", (event) => {
      event.preventDefault();
      this.start();
    });
    $("cancel").addEventListener("click", async () => this.show(await this.state.attempt(cancelJob)));
    $("commands").addEventListener("click", () => this.list());
    for (const button of document.querySelectorAll("#elsewhere button")) {
      button.addEventListener("click", () => this.write(button.value));
    }
  }

  job() {
    const form = new FormData($("job"));
    const numbers = Object.fromEntries(["steps", "heads", "seeds"].map((name) => [name, Number(form.get(name))]));
    return { model: form.get("model"), ...numbers };
  }

  async start() {
    await this.state.history?.save();
    const status = await this.state.attempt(() => startJob(this.job()));
    if (status) this.watch(status);
  }

  // Also at the start of the page: a job goes on while the page is loaded again.
  async watch(status) {
    this.show(status);
    while (status?.state === "running" || status?.state === "serving") {
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
      status = await jobStatus().catch(() => status);
      this.show(status);
    }
  }

  show(status) {
    if (!status) return;
    const { state, step, share, message, url } = status;
    const busy = state === "running" || state === "serving";
    if (busy) $("serve").open = true;
    $("start").disabled = busy;
    $("cancel").hidden = !busy;
    $("cancel").textContent = state === "serving" ? "Stop the service" : "Cancel";
    $("share").hidden = state !== "running";
    $("share").value = share;
    const said = {
      idle: "",
      running: `${DOES[step]}: ${percent(share)}`,
      cancelled: step === "fit" ? "Cancelled. The next start resumes the fit, unless you draw or change the numbers." : "Cancelled.",
      failed: `${DOES[step]} failed.\n${message}`,
      serving: "The service runs: ",
    }[state];
    if ($("job-said").dataset.said === said + url) return;
    $("job-said").dataset.said = said + url;
    $("job-said").replaceChildren(said, ...(url ? [make("a", { href: url, target: "_blank", rel: "noreferrer" }, url)] : []));
  }

  async list() {
    const found = await this.state.attempt(() => commands(this.job()));
    if (!found) return;
    $("command-lines").hidden = false;
    $("command-lines").textContent = found.commands.join("\n");
  }

  async write(format) {
    await this.state.history?.save();
    const found = await this.state.attempt(() => writeElsewhere(format));
    if (found) $("written").textContent = found.files.length ? `Written: ${found.files.join(", ")}` : "Nothing is drawn yet.";
  }
}
