// Sigstore's certificate authority with its log, transparency log, timestamp authority and sign-in on a port of this machine,
// made of sigstore's own @sigstore/mock, whose keys, certificates, logs and timestamps are real ones.
//
// The handlers there take what sigstore's JavaScript client sends, before a real log has normalized it: here stands
// what the services of sigstore do with requests of other clients. Prints one line of JSON: name -> trust config.

const crypto = require("node:crypto");
const http = require("node:http");
const mock = require("@sigstore/mock");
const { HashAlgorithm, PublicKeyDetails, TrustedRoot } = require("@sigstore/protobuf-specs");
const pkijs = require("pkijs");

const HOUR = 3600_000;
const sha256 = (data) => crypto.createHash("sha256").update(data).digest();

// Fulcio: the token is in a header, and the request for a certificate in base64.
function certificateRequest(body, headers) {
  const pem = Buffer.from(JSON.parse(body).certificateSigningRequest, "base64").toString();
  const oidcIdentityToken = headers.authorization.replace("Bearer ", "");
  return JSON.stringify({ certificateSigningRequest: pem, credentials: { oidcIdentityToken } });
}

// Rekor logs digests of an envelope and its signatures, not the envelope.
function logEntry(body) {
  const { apiVersion, kind, spec } = JSON.parse(body);
  const { envelope, verifiers } = spec.proposedContent;
  const { payload, signatures } = JSON.parse(envelope);
  const digest = (data) => ({ algorithm: "sha256", value: sha256(data).toString("hex") });
  return JSON.stringify({
    apiVersion,
    kind,
    spec: {
      envelopeHash: digest(envelope),
      payloadHash: digest(Buffer.from(payload, "base64")),
      signatures: signatures.map(({ sig }) => ({ signature: sig, verifier: verifiers[0] })),
    },
  });
}

// RFC 3161: the request is DER.
function timestampRequest(body) {
  const { messageImprint } = pkijs.TimeStampReq.fromBER(body);
  const artifactHash = Buffer.from(messageImprint.hashedMessage.valueBlock.valueHexView).toString("base64");
  return JSON.stringify({ artifactHash, hashAlgorithm: "sha256" });
}

// OpenID Connect: a provider at which everybody is one person, without a password.
function signIn(request, url, answer) {
  const { pathname, searchParams } = new URL(request.url, url);
  const encoded = (claims) => Buffer.from(JSON.stringify(claims)).toString("base64url");
  const now = Math.floor(Date.now() / 1000);
  const claims = { aud: "sigstore", iss: url, sub: "person@example.org", iat: now, nbf: now - 60, exp: now + 600 };
  const found = {
    "/.well-known/openid-configuration": { authorization_endpoint: `${url}/auth`, token_endpoint: `${url}/token` },
    "/token": { access_token: `${encoded({ alg: "none", kid: "x" })}.${encoded(claims)}.c2lnbmF0dXJl` },
  }[pathname];
  if (pathname === "/auth") {
    const { redirect_uri: to, state } = Object.fromEntries(searchParams);
    answer.writeHead(302, { Location: `${to}?code=once&state=${state}` }).end();
  } else {
    answer.writeHead(found ? 200 : 404, { "Content-Type": "application/json" }).end(JSON.stringify(found ?? {}));
  }
}

async function started(name, logged) {
  const server = http.createServer();
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  const url = `http://127.0.0.1:${server.address().port}`;
  const keyPair = crypto.generateKeyPairSync("ec", { namedCurve: "prime256v1" });
  const ctlog = await mock.initializeCTLog(keyPair);
  const ca = await mock.initializeCA(keyPair, ctlog);
  const tlog = await mock.initializeTLog(url, keyPair, logged);
  const tsa = await mock.initializeTSA(keyPair, logged);
  const routes = [
    [mock.fulcioHandler(ca), certificateRequest],
    [mock.rekorHandler(tlog), logEntry],
    [mock.tsaHandler(tsa), timestampRequest],
  ];
  server.on("request", async (request, answer) => {
    const [handler, translated] = routes.find(([{ path }]) => request.url.replace(/\/$/, "") === path) ?? [];
    const body = Buffer.concat(await request.toArray());
    if (!handler) {
      signIn(request, url, answer);
      return;
    }
    const { statusCode, response, contentType } = await handler.fn(translated(body, request.headers));
    answer.writeHead(statusCode, { "Content-Type": contentType ?? "text/plain" }).end(response);
  });

  const validFor = { start: new Date(Date.now() - HOUR) };
  const log = (rawBytes) => ({
    baseUrl: url,
    logId: { keyId: sha256(rawBytes) },
    hashAlgorithm: HashAlgorithm.SHA2_256,
    publicKey: { rawBytes, keyDetails: PublicKeyDetails.PKIX_ECDSA_P256_SHA_256, validFor },
    operator: name,
  });
  const authority = (...certificates) => ({
    subject: { commonName: "sigstore", organization: name },
    uri: url,
    certChain: { certificates: certificates.map(({ buffer }) => ({ rawBytes: Buffer.from(buffer) })) },
    validFor,
    operator: name,
  });
  const service = (path) => [{ url: url + path, majorApiVersion: 1, validFor, operator: name }];
  return {
    mediaType: "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
    trustedRoot: TrustedRoot.toJSON({
      mediaType: "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
      certificateAuthorities: [authority(ca.rootCertificate)],
      ctlogs: [log(ctlog.publicKey)],
      tlogs: [log(tlog.publicKey)],
      timestampAuthorities: [authority(tsa.intCertificate, tsa.rootCertificate)],
    }),
    signingConfig: {
      mediaType: "application/vnd.dev.sigstore.signingconfig.v0.2+json",
      caUrls: service(""),
      oidcUrls: service(""),
      rekorTlogUrls: service(""),
      rekorTlogConfig: { selector: "ANY" },
      tsaUrls: service("/api/v1/timestamp"),
      tsaConfig: { selector: "ANY" },
    },
  };
}

async function main() {
  const ours = await started("ours");
  const theirs = await started("theirs");
  const late = await started("late", new Date(Date.now() + HOUR)); // when its certificates have expired
  console.log(JSON.stringify({ ours, theirs, late }));
}

main();
