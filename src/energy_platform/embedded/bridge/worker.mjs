// The engine thread: one PGlite, that is one PostgreSQL backend, in a synchronous loop.
//
// The loop never returns to Node's event loop. Requests are taken with receiveMessageOnPort() and
// awaited with Atomics.wait(), so that the engine's read callback can BLOCK for more bytes in the
// middle of a COPY, exactly as a native backend blocks in recv(). Because of that COPY needs no
// buffering, and the messages of a group reach the engine as they came from the client.
import fs from 'node:fs'
import path from 'node:path'
import { pathToFileURL } from 'node:url'
import { parentPort, receiveMessageOnPort, workerData } from 'node:worker_threads'

import { CONTROL, HEAP_PAGE_BYTES, queryMessage } from './wire.mjs'

const { control, requests, dataDir, database, packageDir, extensions, fsync } = workerData

const OUTPUT_CHUNK_BYTES = 256 * 1024
// The engine may run this many unread chunks ahead of a slow client, then it waits.
const OUTPUT_CHUNKS_AHEAD_MAX = 64
const STACK_BYTES = 64 * 1024 * 1024
const ERRNO_IO = 29 // EIO, as WASI numbers it

const bootMessages = []
let booted = false
let engineFiles = null
let stackPointer = null

const pglite = await loadEngine()
const engine = pglite.Module
enlargeStack()
// The columnstore lives in a module that CREATE EXTENSION loads, but a reopened folder does not.
await pglite.exec("LOAD 'timescaledb'; RESET ALL")

let input = Buffer.alloc(0)
let inputAt = 0
let output = new Uint8Array(OUTPUT_CHUNK_BYTES)
let outputLength = 0
// PGlite's own callbacks parse every row into JavaScript values; ours only move bytes.
engine._set_read_write_cbs(
  engine.addFunction(readForEngine, 'iii'),
  engine.addFunction(writeFromEngine, 'iii'),
)
booted = true
parentPort.postMessage({ kind: 'ready', module: workerData.module })
serve()

async function loadEngine() {
  wrapInstantiate()
  const { PGlite } = await import(pathToFileURL(path.join(packageDir, 'index.js')))
  workerData.module ??= await WebAssembly.compile(
    fs.readFileSync(path.join(packageDir, 'pglite.wasm')),
  )
  try {
    // The options must be the FIRST argument: create(undefined, options) ignores them.
    return await PGlite.create({
      dataDir,
      database,
      wasmModule: workerData.module,
      extensions: Object.fromEntries(extensions.map(describeExtension)),
    })
  } catch (error) {
    throw new Error([error?.message ?? error, ...bootMessages.slice(-10)].join('\n'))
  }
}

function describeExtension(name) {
  const setup = async (_pglite, emscriptenOpts) => {
    emscriptenOpts.preRun.push((module) => (engineFiles = module.FS))
    emscriptenOpts.print = emscriptenOpts.printErr = reportEngineText
    return { emscriptenOpts, bundlePath: pathToFileURL(path.join(packageDir, `${name}.tar.gz`)) }
  }
  return [name, { name, setup }]
}

// While booting the engine prints hundreds of lines, wanted only when the boot fails; afterwards it
// prints what ends it.
function reportEngineText(text) {
  if (!booted) bootMessages.push(text)
  else if (/^[^#].*(?:FATAL|PANIC)/.test(text)) parentPort.postMessage({ kind: 'text', text })
}

// As shipped, fdatasync() does nothing and fsync() does not know the folder's file system, so an
// acknowledged commit would not survive a power cut. Let both reach the file.
function wrapInstantiate() {
  const instantiate = WebAssembly.instantiate.bind(WebAssembly)
  WebAssembly.instantiate = (module, imports) => {
    if (imports?.env?.__syscall_fdatasync) {
      stackPointer = imports.env.__stack_pointer
      if (fsync) {
        imports.env.__syscall_fdatasync = (fd) => -syncFile(fd, fs.fdatasyncSync)
        imports.wasi_snapshot_preview1.fd_sync = (fd) => syncFile(fd, fs.fsyncSync)
      }
    }
    return instantiate(module, imports)
  }
}

// The engine's stack lies above its data and nothing checks its depth: a deeply nested expression
// would overwrite the system caches in silence. On a stack this large Node's own limit is reached
// first, which ends the engine before it has damaged anything.
function enlargeStack() {
  const bottom = engine._malloc(STACK_BYTES)
  stackPointer.value = (bottom + STACK_BYTES) & ~15
}

function syncFile(fd, sync) {
  const nodeFd = engineFiles?.getStream(fd)?.nfd
  if (nodeFd === undefined || nodeFd === null) return 0 // a file of the in-memory file system
  try {
    sync(nodeFd)
  } catch {
    return ERRNO_IO // the engine panics, and recovers from its log: it must not acknowledge
  }
  Atomics.add(control, CONTROL.syncs, 1)
  return 0
}

function serve() {
  for (;;) {
    const request = nextRequest()
    if (request.kind === 'run') {
      if (!run(request.bytes)) return
    } else if (request.kind === 'close') {
      shutDown()
      return
    }
    // 'input' for a COPY that has already failed: the engine no longer wants it.
  }
}

function nextRequest() {
  for (;;) {
    const received = receiveMessageOnPort(requests)
    if (received) {
      Atomics.sub(control, CONTROL.requests, 1)
      return received.message
    }
    Atomics.wait(control, CONTROL.requests, 0)
  }
}

function run(bytes) {
  input = bytes
  inputAt = 0
  try {
    while (inputAt < input.length) {
      engine._interactive_one(input.length - inputAt, input[inputAt])
    }
  } catch (error) {
    const reason = String(error?.message ?? error)
    parentPort.postMessage({ kind: 'dead', bytes: takeOutput(), reason })
    return false
  }
  Atomics.store(control, CONTROL.heapPages, engine.HEAPU8.length / HEAP_PAGE_BYTES)
  parentPort.postMessage({ kind: 'done', bytes: takeOutput() })
  return true
}

function readForEngine(pointer, length) {
  while (inputAt >= input.length) waitForInput()
  const count = Math.min(length, input.length - inputAt)
  engine.HEAPU8.set(input.subarray(inputAt, inputAt + count), pointer)
  inputAt += count
  return count
}

function waitForInput() {
  parentPort.postMessage({ kind: 'need', bytes: takeOutput() })
  input = nextRequest().bytes
  inputAt = 0
}

function writeFromEngine(pointer, length) {
  if (outputLength + length > output.length) {
    if (outputLength > 0) flushOutput()
    if (length > output.length) {
      postChunk(engine.HEAPU8.slice(pointer, pointer + length))
      return length
    }
  }
  output.set(engine.HEAPU8.subarray(pointer, pointer + length), outputLength)
  outputLength += length
  return length
}

function flushOutput() {
  const full = output.subarray(0, outputLength)
  output = new Uint8Array(OUTPUT_CHUNK_BYTES)
  outputLength = 0
  postChunk(full)
}

// Chunks in the middle of an answer are counted, so that a slow client slows the engine down
// instead of filling the memory.
function postChunk(bytes) {
  Atomics.add(control, CONTROL.chunksAhead, 1)
  parentPort.postMessage({ kind: 'output', bytes }, [bytes.buffer])
  for (;;) {
    const ahead = Atomics.load(control, CONTROL.chunksAhead)
    if (ahead < OUTPUT_CHUNKS_AHEAD_MAX) return
    Atomics.wait(control, CONTROL.chunksAhead, ahead)
  }
}

function takeOutput() {
  const bytes = output.slice(0, outputLength)
  outputLength = 0
  return bytes
}

function shutDown() {
  try {
    const checkpoint = queryMessage('CHECKPOINT')
    run(checkpoint)
    engine._pgl_shutdown()
  } catch {
    // Shutting down ends in an exit status that arrives as an exception; the log is on disk.
  }
  parentPort.postMessage({ kind: 'closed' })
}
