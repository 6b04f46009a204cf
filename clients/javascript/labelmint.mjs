// A client made from the proto when it is run: nothing is generated or compiled.
//
// Rules of this file:
// - A walk's whole state is nextSeed. It is tried again from there where the protocol says that this is safe.
// - Pixels come raw: image [height, width, 3] and label [height, width], a byte a value.
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const PROTO = fileURLToPath(new URL("sample_service.proto", import.meta.url));
const RAW = { imageEncoding: "ENCODING_RAW", labelEncoding: "ENCODING_RAW" };
const MAX_PAUSE_MS = 5000;
// gRPC itself cancels what a gateway short of processor time did not take up; nobody here cancels what is still read.
const { UNAVAILABLE, RESOURCE_EXHAUSTED, CANCELLED } = grpc.status;
const RETRYABLE = [UNAVAILABLE, RESOURCE_EXHAUSTED, CANCELLED];

const definition = protoLoader.loadSync(PROTO, { longs: Number, enums: String, defaults: true, oneofs: true });
const { SampleService } = grpc.loadPackageDefinition(definition).labelmint.v1;

// A client for one gateway, HOST:PORT. With TLS: credentials = grpc.credentials.createSsl(rootCertificates).
export function connect(endpoint, credentials = grpc.credentials.createInsecure()) {
  return new SampleService(endpoint, credentials, { "grpc.max_receive_message_length": -1 });
}

// The service's description of a model: task, digest, classes, calibration.
export function getModel(client, model) {
  return new Promise((resolve, reject) => {
    client.getModel({ model }, (error, answer) => (error ? reject(error) : resolve(answer.model)));
  });
}

// The accepted samples of a walk, each once and in order, for a segmentation model; `request` is a StreamSamplesRequest.
// It goes on by itself when a gateway ends or renews the stream, with the version that it began with, and throws any
// other error.
export async function* streamSamples(client, request) {
  const { version, digest } = await getModel(client, request.model);
  let nextSeed = request.startSeed ?? 0;
  let remaining = request.count;
  let failures = 0;
  while (true) {
    const asked = { ...request, modelVersion: version, startSeed: nextSeed, count: remaining };
    const call = client.streamSamples({ ...asked, options: { ...request.options, ...RAW } });
    call.on("error", () => {}); // the loop throws it; after the loop it only says that the call was cancelled
    try {
      for await (const message of call) {
        failures = 0;
        nextSeed = message.nextSeed;
        if (!message.sample) continue; // a heartbeat: only the cursor moved
        if (message.sample.modelDigest !== digest) throw new Error(`${request.model} now has other weights; start anew`);
        yield message.sample;
        if (remaining && --remaining === 0) return;
      }
      return;
    } catch (error) {
      if (!RETRYABLE.includes(error.code)) throw error;
      await sleep(Math.random() * Math.min(MAX_PAUSE_MS, 100 * 2 ** failures++));
    } finally {
      call.cancel();
    }
  }
}
