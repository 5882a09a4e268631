// Runs the trace processor of Perfetto's user interface, a WebAssembly module that a web worker drives, in node:
// node trace_processor.js FOLDER: requests come on standard input, replies go to standard output.
"use strict";
const fs = require("fs");
const path = require("path");
const vm = require("vm");

const folder = process.argv[2];
const page = {
    console: { log: console.error, warn: console.error, error: console.error, info: console.error },
    XMLHttpRequest: class {
        open(method, name) {
            this.response = Uint8Array.from(fs.readFileSync(path.join(folder, name))).buffer;
            this.status = 200;
        }
        send() {
            if (this.onload) this.onload();
        }
    },
    location: { href: "" },
    WorkerGlobalScope: Object,
    ...{ URL, TextDecoder, TextEncoder, performance, setTimeout, clearTimeout, crypto },
};
page.self = page.globalThis = page;
vm.createContext(page);
// The arrays that the module makes are of its own realm, where it asks for them.
page.toArray = vm.runInContext("(bytes) => Uint8Array.from(bytes)", page);
vm.runInContext(fs.readFileSync(path.join(folder, "engine_bundle.js"), "utf-8"), page);

const port = { postMessage: (reply) => process.stdout.write(Buffer.from(reply)) };
page.onmessage({ data: port });
const requests = fs.readFileSync(0);
const ready = setInterval(() => {
    if (port.onmessage) {
        try {
            port.onmessage({ data: page.toArray(requests) });
            clearInterval(ready);
        } catch (error) {
            if (!/before runtime initialization|not initialized/.test(String(error))) throw error;
        }
    }
}, 10);
