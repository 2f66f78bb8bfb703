// A gRPC client that is not Python: one streaming generation, a line of JSON for each message.
//
//     node generate.js PROTO_FOLDER HOST:PORT REQUEST_JSON
//
// Ends with status 0, or with 1 and a line {"error": {code, field}}.
"use strict";

const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [protos, address, request] = process.argv.slice(2);
const definition = loader.loadSync("outrider/v1/generation.proto", {
  includeDirs: [protos],
  longs: String,
  enums: String,
  oneofs: true,
});
const { GenerationService } = grpc.loadPackageDefinition(definition).outrider.v1;
const client = new GenerationService(address, grpc.credentials.createInsecure());
const metadata = new grpc.Metadata();
metadata.set("x-request-id", "from-node");
const call = client.Generate(JSON.parse(request), metadata, {
  deadline: Date.now() + 30_000,
});

const say = (value) => process.stdout.write(JSON.stringify(value) + "\n");
call.on("data", say);
call.on("error", (error) => {
  const [field] = error.metadata.get("outrider-field");
  say({ error: { code: grpc.status[error.code], field, requestId: error.metadata.get("x-request-id")[0] } });
  process.exitCode = 1;
  client.close();
});
call.on("end", () => client.close());
