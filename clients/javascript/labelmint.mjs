// A client made from the proto when it is run: nothing is generated or compiled.
//
// Rules of this file:
// - It reads sample_service.proto beside it and the packages of package.json, nothing else: copy both files together.
// - A walk's whole state is nextSeed. It is tried again from there where the protocol says that this is safe.
// - Whatever is tried again gives up where the gateway gave nothing for `patienceMs`, and throws the last error.
// - Pixels come raw unless the request says otherwise: image [height, width, 3] and label [height, width], a byte a value.
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
  "grpc.keepalive_time_ms": 20_000, // a gateway ends connections that ping more often than every 5 s
  "grpc.keepalive_timeout_ms": 10_000,
  "grpc.keepalive_permit_without_calls": 1,
};
// gRPC itself cancels what a gateway short of processor time did not take up; nobody here cancels what is still read.
const { UNAVAILABLE, RESOURCE_EXHAUSTED, CANCELLED, DEADLINE_EXCEEDED } = grpc.status;
const RETRYABLE = [UNAVAILABLE, RESOURCE_EXHAUSTED, CANCELLED];

const definition = protoLoader.loadSync(PROTO, { longs: Number, enums: String, defaults: true, oneofs: true });
const { SampleService } = grpc.loadPackageDefinition(definition).labelmint.v1;

// What google.rpc says of an error, in the trailer grpc-status-details-bin.
const rpc = protobuf.parse(`syntax = "proto3"; package rpc;
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message Duration { int64 seconds = 1; int32 nanos = 2; }
  message RetryInfo { Duration retry_delay = 1; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }`).root;

// A client for one gateway, HOST:PORT. With TLS: credentials = grpc.credentials.createSsl(rootCertificates). A token is
// sent over TLS only: without it, gRPC refuses one.
export function connect(endpoint, credentials = grpc.credentials.createInsecure(), token = "") {
  if (token) {
    const headers = new grpc.Metadata();
    headers.set("authorization", `Bearer ${token}`);
    const bearer = grpc.credentials.createFromMetadataGenerator((_, done) => done(null, headers));
    credentials = grpc.credentials.combineChannelCredentials(credentials, bearer);
  }
  return new SampleService(endpoint, credentials, CHANNEL);
}

// The service's description of a model: task, digest, classes or keypoints, calibration.
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

// The accepted samples of a walk, each once and in order; `request` is a StreamSamplesRequest. It goes on by itself when
// a gateway ends or renews the stream, with the version that it began with, and throws any other error. An error that
// the gateway wrote has its `reason` and, as `info`, the metadata of that reason (both in the head of the proto).
export async function* streamSamples(client, request, { patienceMs = PATIENCE_MS } = {}) {
  const { modelVersion } = request;
  const { version, digest, task } = await getModel(client, request.model, { modelVersion, patienceMs });
  const options = withEncodings(request.options, task);
  const patience = new Patience(patienceMs);
  let nextSeed = request.startSeed ?? 0;
  let remaining = request.count;
  do {
    const asked = { ...request, options, modelVersion: version, startSeed: nextSeed, count: remaining };
    const call = client.streamSamples(asked);
    call.on("error", () => {}); // the loop throws it; after the loop it only says that the call was cancelled
    try {
      for await (const message of call) {
        patience.renew();
        const { sample } = message;
        if (sample && sample.modelDigest !== digest) throw new Error(`${request.model} now has other weights; start anew`);
        nextSeed = message.nextSeed;
        if (!sample) continue; // a heartbeat: only the cursor moved
        yield sample;
        patience.renew(); // what the reader took its time for is not the gateway's silence
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

// Raw pixels for what the request asks for: an encoding of what does not come is an error.
function withEncodings(options = {}, task) {
  const encodings = {};
  if (!options.omitImage) encodings.imageEncoding = "ENCODING_RAW";
  if (!options.omitLabel && task !== "keypoints") encodings.labelEncoding = "ENCODING_RAW";
  return { ...encodings, ...options };
}

// Decides whether and when a failed call is tried again.
class Patience {
  constructor(milliseconds) {
    this.milliseconds = milliseconds;
    this.renew();
  }

  // The gateway gave something.
  renew() {
    this.failures = 0;
    this.last = null; // the last error that the call was tried again after
    this.end = Date.now() + this.milliseconds;
  }

  // Waits until the call may be tried again; throws the error where it may not, or not in time.
  async pauseAfter(error) {
    const { retryDelayMs = 0 } = explain(error);
    // The patience cut this try off, and the gateway wrote nothing: the try before it says what is wrong.
    if (error.code === DEADLINE_EXCEEDED && !error.reason && this.last) throw this.last;
    if (!RETRYABLE.includes(error.code)) throw error;
    const renewed = error.reason === "STREAM_EXPIRED"; // the gateway is well: resume at once
    const jitter = renewed ? 0 : Math.random() * Math.min(MAX_PAUSE_MS, 100 * 2 ** this.failures++);
    if (Date.now() + retryDelayMs + jitter >= this.end) throw error;
    this.last = error;
    await sleep(retryDelayMs + jitter);
  }
}

// Gives an error the gateway's `reason`, `info` and `retryDelayMs`, where it wrote them.
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
