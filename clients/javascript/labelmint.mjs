// A client that loads the proto when it runs: nothing is generated or compiled.
//
// Rules of this file:
// - It needs only the packages of package.json, and sample_service.proto next to it: copy both files together.
// - The whole state of a walk is nextSeed. A retry resumes there, if the protocol says that a retry is safe.
// - Retries stop when the gateway has sent nothing for `patienceMs`. The client then throws the last error.
// - Pixels are raw by default: image [height, width, 3] and label [height, width], one byte per value.
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";
import protobuf from "protobufjs";

const PROTO = fileURLToPath(new URL("sample_service.proto", import.meta.url));
const SEED_END = 2 ** 32;
const PATIENCE_MS = 60_000;
const MAX_PAUSE_MS = 5000;
const CHANNEL = {
  "grpc.max_receive_message_length": -1, // a sample of 1024x1024 is above gRPC's 4 MiB
  "grpc.keepalive_time_ms": 20_000, // gateways close connections that ping more often than every 5 s
  "grpc.keepalive_timeout_ms": 10_000,
  "grpc.keepalive_permit_without_calls": 1,
};
// CANCELLED is retryable because this client never cancels a call that it still reads. It comes from gRPC itself, which
// cancels a call that a gateway short of CPU time did not accept in time.
const { UNAVAILABLE, RESOURCE_EXHAUSTED, CANCELLED, DEADLINE_EXCEEDED } = grpc.status;
const RETRYABLE = [UNAVAILABLE, RESOURCE_EXHAUSTED, CANCELLED];

const definition = protoLoader.loadSync(PROTO, { longs: Number, enums: String, defaults: true, oneofs: true });
const { SampleService } = grpc.loadPackageDefinition(definition).labelmint.v1;

// The google.rpc details of an error, as sent in the trailer grpc-status-details-bin.
const rpc = protobuf.parse(`syntax = "proto3"; package rpc;
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message Duration { int64 seconds = 1; int32 nanos = 2; }
  message RetryInfo { Duration retry_delay = 1; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }`).root;

// Returns a client for one gateway, HOST:PORT. For TLS, credentials = grpc.credentials.createSsl(rootCertificates).
// A token needs TLS: without TLS, gRPC refuses the token.
export function connect(endpoint, credentials = grpc.credentials.createInsecure(), token = "") {
  if (token) {
    const headers = new grpc.Metadata();
    headers.set("authorization", `Bearer ${token}`);
    const bearer = grpc.credentials.createFromMetadataGenerator((_, done) => done(null, headers));
    credentials = grpc.credentials.combineChannelCredentials(credentials, bearer);
  }
  return new SampleService(endpoint, credentials, CHANNEL);
}

// Returns the description of a model: task, digest, classes or keypoints, calibration.
export async function getModel(client, model, { modelVersion = "", patienceMs = PATIENCE_MS } = {}) {
  const patience = new Patience(patienceMs);
  while (true) {
    try {
      return await new Promise((resolve, reject) => {
        const done = (error, answer) => (error ? reject(error) : resolve(answer.model));
        client.getModel({ model, modelVersion }, { deadline: patience.end }, done);
      });
    } catch (error) {
      await patience.pauseAfter(error);
    }
  }
}

// Yields the accepted samples of a walk, each once and in order; `request` is a StreamSamplesRequest. If a gateway ends
// the stream with a retryable error, the walk resumes with the version that it began with. Other errors are thrown. An
// error from the gateway has a `reason` and, as `info`, the metadata of that reason; the head of the proto lists both.
export async function* streamSamples(client, request, { patienceMs = PATIENCE_MS } = {}) {
  const { modelVersion } = request;
  const { version, digest, classes } = await getModel(client, request.model, { modelVersion, patienceMs });
  const options = withEncodings(request.options, classes);
  const patience = new Patience(patienceMs);
  let nextSeed = request.startSeed ?? 0;
  let remaining = request.count;
  do {
    const asked = { ...request, options, modelVersion: version, startSeed: nextSeed, count: remaining };
    const call = client.streamSamples(asked);
    call.on("error", () => {}); // the loop below throws the error; after the loop, it only reports the cancelled call
    try {
      for await (const message of call) {
        patience.renew();
        const { sample } = message;
        if (sample && sample.modelDigest !== digest) throw new Error(`${request.model} now has other weights; start again`);
        if (sample) checkKnown(options, sample);
        nextSeed = message.nextSeed;
        if (!sample) continue; // a heartbeat: only nextSeed moved
        yield sample;
        patience.renew(); // the time that the reader spent on the sample must not count as silence of the gateway
        if (remaining && --remaining === 0) return;
      }
      return;
    } catch (error) {
      await patience.pauseAfter(error);
    } finally {
      call.cancel();
    }
  } while (nextSeed < SEED_END);
}

// Throws if a sample shows that the gateway does not know an option. A gateway of an earlier version ignores such options
// and would deliver samples that nobody asked for.
function checkKnown({ where = [], ignoreJsQuantile, classIndex }, sample) {
  const unknown = [];
  if (where.length > sample.content.length) unknown.push("where");
  if (ignoreJsQuantile !== undefined && !sample._ignoreJsQuantile) unknown.push("ignoreJsQuantile");
  if (classIndex !== undefined && !sample._classIndex) unknown.push("classIndex");
  if (unknown.length > 0) throw new Error(`the gateway is older than this client and does not know: ${unknown.join(", ")}`);
}

// Sets raw encodings, but only for the parts that the request includes: an encoding of an omitted part is an error.
// Only a model with classes has a label image.
function withEncodings(options = {}, classes) {
  const encodings = {};
  if (!options.omitImage) encodings.imageEncoding = "ENCODING_RAW";
  if (!options.omitLabel && classes.length > 0) encodings.labelEncoding = "ENCODING_RAW";
  return { ...encodings, ...options };
}

// Decides whether and when to retry a failed call.
class Patience {
  constructor(milliseconds) {
    this.milliseconds = milliseconds;
    this.renew();
  }

  // Records that the gateway sent something.
  renew() {
    this.failures = 0;
    this.last = null; // the error before the last retry
    this.end = Date.now() + this.milliseconds;
  }

  // Waits until the call may be retried. Throws the error if a retry is not safe, or not possible in time.
  async pauseAfter(error) {
    const { retryDelayMs = 0 } = explain(error);
    // The patience ended during this attempt, and the gateway gave no reason. The error of the previous attempt names
    // the cause.
    if (error.code === DEADLINE_EXCEEDED && !error.reason && this.last) throw this.last;
    if (!RETRYABLE.includes(error.code)) throw error;
    const renewed = error.reason === "STREAM_EXPIRED"; // the gateway is healthy: resume at once
    const jitter = renewed ? 0 : Math.random() * Math.min(MAX_PAUSE_MS, 100 * 2 ** this.failures++);
    if (Date.now() + retryDelayMs + jitter >= this.end) throw error;
    this.last = error;
    await sleep(retryDelayMs + jitter);
  }
}

// Adds the gateway's `reason`, `info` and `retryDelayMs` to an error, if the gateway sent them.
function explain(error) {
  const [packed] = error.metadata?.get("grpc-status-details-bin") ?? [];
  if (!packed) return error;
  for (const { typeUrl, value } of rpc.lookupType("rpc.Status").decode(packed).details) {
    if (typeUrl.endsWith("/google.rpc.RetryInfo")) {
      const { seconds, nanos } = rpc.lookupType("rpc.RetryInfo").decode(value).retryDelay;
      error.retryDelayMs = Number(seconds) * 1000 + nanos / 1e6;
    } else if (typeUrl.endsWith("/google.rpc.ErrorInfo")) {
      const { domain, reason, metadata } = rpc.lookupType("rpc.ErrorInfo").decode(value);
      if (domain === "labelmint") Object.assign(error, { reason, info: metadata });
    }
  }
  return error;
}
