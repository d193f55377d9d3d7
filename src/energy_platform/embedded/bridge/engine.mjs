// The life of the engine thread: boot, run, kill, shut down, switch to another database.
//
// There is one engine and it has one database open. It knows nothing of clients; whoever holds it
// (see scheduler.mjs) gives it bytes of the protocol and receives bytes.
import path from 'node:path'
import { MessageChannel, Worker } from 'node:worker_threads'

import {
  BACKEND,
  CONTROL,
  FrameReader,
  HEADER_BYTES,
  HEAP_PAGE_BYTES,
  copyFailMessage,
  queryMessage,
  readDataRow,
  readErrorFields,
} from './wire.mjs'

// Each is a bundle beside the engine; every one that is listed costs memory and time at boot.
const EXTENSIONS = ['timescaledb', 'btree_gist', 'pg_trgm', 'uuid-ossp', 'citext']
// Deep expressions recurse in Node's stack as well, see enlargeStack() in worker.mjs.
const THREAD_STACK_MB = 16
// Larger buffers are handed over to the engine thread instead of being copied to it.
const TRANSFER_BYTES_MIN = 64 * 1024
const WORKER_URL = new URL('./worker.mjs', import.meta.url)

export class Engine {
  #config
  #log
  #worker = null
  #requests = null
  #module = undefined
  #current = null
  #onClosed = null
  #terminated = Promise.resolve()
  #control = new Int32Array(new SharedArrayBuffer(4 * CONTROL.length))

  database = null
  // Counts the times at which the engine forgot all prepared statements: boots, DEALLOCATE ALL.
  statementEpoch = 0
  // Which session's unnamed statement the engine holds; any simple query drops it.
  unnamedOwner = null
  // The session state that is in force, see settings.mjs; null when it is not known.
  stateKey = null
  boots = 0
  kills = 0
  runs = 0

  constructor({ modulesDir, dataDir, fsync, log }) {
    const packageDir = path.join(modulesDir, 'node_modules', '@unni-craftsman', 'pglite', 'dist')
    this.#config = { packageDir, dataDir, fsync, extensions: EXTENSIONS }
    this.#log = log
  }

  get running() {
    return this.#worker !== null
  }

  // How many times a file really went to disk since the process started.
  get syncs() {
    return Atomics.load(this.#control, CONTROL.syncs)
  }

  get heapBytes() {
    return Atomics.load(this.#control, CONTROL.heapPages) * HEAP_PAGE_BYTES
  }

  async boot(database) {
    const since = performance.now()
    await this.#terminated
    const { port1, port2 } = new MessageChannel()
    Atomics.store(this.#control, CONTROL.requests, 0)
    Atomics.store(this.#control, CONTROL.chunksAhead, 0)
    const worker = new Worker(WORKER_URL, {
      workerData: {
        ...this.#config,
        database,
        control: this.#control,
        requests: port2,
        module: this.#module,
      },
      transferList: [port2],
      resourceLimits: { stackSizeMb: THREAD_STACK_MB },
    })
    this.#requests = port1
    try {
      this.#module = await this.#untilReady(worker)
    } catch (error) {
      await worker.terminate()
      throw error
    }
    this.#worker = worker
    this.database = database
    this.statementEpoch++
    this.unnamedOwner = null
    this.stateKey = null
    this.boots++
    this.#log('engine booted', { database, boot_ms: Math.round(performance.now() - since) })
  }

  #untilReady(worker) {
    return new Promise((resolve, reject) => {
      worker.on('error', (error) => {
        reject(error)
        this.#died(worker, `${error.message}`)
      })
      worker.on('exit', (status) => {
        reject(new Error(`engine thread ended with status ${status}`))
        this.#died(worker, 'engine thread ended')
      })
      worker.on('message', (received) => {
        if (received.kind === 'ready') resolve(received.module)
        else if (worker === this.#worker) this.#receive(worker, received)
      })
    })
  }

  #receive(worker, received) {
    const bytes = received.bytes
    if (bytes?.length > 0) {
      this.#current?.onOutput(Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength))
    }
    switch (received.kind) {
      case 'output':
        this.#current?.admitNextChunk(() => this.#consumedChunk())
        break
      case 'need':
        this.#current?.onNeed()
        break
      case 'done':
        this.#finish({ died: null })
        break
      case 'dead':
        this.#died(worker, received.reason)
        break
      case 'closed':
        this.#onClosed?.()
        break
      case 'text':
        this.#log('engine said', { text: received.text })
        break
    }
  }

  #consumedChunk() {
    Atomics.sub(this.#control, CONTROL.chunksAhead, 1)
    Atomics.notify(this.#control, CONTROL.chunksAhead)
  }

  #finish(outcome) {
    const current = this.#current
    this.#current = null
    current?.resolve(outcome)
  }

  // The next boot must not begin before the dead thread has let go of its files.
  async #died(worker, reason) {
    if (this.#worker !== worker) return
    this.#worker = null
    this.database = null
    this.stateKey = null
    this.#terminated = worker.terminate()
    await this.#terminated
    this.#finish({ died: reason })
  }

  #send(request, transfer) {
    this.#requests.postMessage(request, transfer)
    Atomics.add(this.#control, CONTROL.requests, 1)
    Atomics.notify(this.#control, CONTROL.requests)
  }

  // Runs a group of messages to its end; resolves to { died }, null or the reason.
  //
  // onOutput(bytes) receives the answer, piece by piece. onNeed() is called when a COPY wants
  // input, to be given by feed(). admitNextChunk(proceed) may delay a long answer.
  run(bytes, { onOutput, onNeed = () => this.refuseCopy(), admitNextChunk = (go) => go() }) {
    if (this.#worker === null) return Promise.resolve({ died: 'the engine is not running' })
    this.runs++
    return new Promise((resolve) => {
      this.#current = { resolve, onOutput, onNeed, admitNextChunk }
      this.#sendBytes('run', bytes)
    })
  }

  feed(bytes) {
    if (this.#worker !== null) this.#sendBytes('input', bytes)
  }

  refuseCopy() {
    this.feed(copyFailMessage('no COPY data is expected here'))
  }

  // A view into a larger buffer would be sent with all of that buffer: cut it out first.
  #sendBytes(kind, view) {
    const bytes = new Uint8Array(view)
    this.#send({ kind, bytes }, bytes.length >= TRANSFER_BYTES_MIN ? [bytes.buffer] : undefined)
  }

  // Runs SQL of the bridge's own; resolves to the rows of all its statements, as text, and the
  // fields of the error, if any.
  async query(sql) {
    this.unnamedOwner = null
    const frames = new FrameReader(backendFrameLength)
    const answer = { rows: [], error: null, status: 'I' }
    const onOutput = (bytes) => {
      frames.push(bytes)
      for (let frame = frames.next(); frame; frame = frames.next()) {
        if (frame[0] === BACKEND.dataRow) answer.rows.push(readDataRow(frame))
        else if (frame[0] === BACKEND.error) answer.error = readErrorFields(frame)
        else if (frame[0] === BACKEND.readyForQuery) {
          answer.status = String.fromCharCode(frame[HEADER_BYTES])
        }
      }
    }
    const { died } = await this.run(queryMessage(sql), { onOutput })
    if (died) answer.error = { S: 'FATAL', C: '57P02', M: `the database engine ended: ${died}` }
    return answer
  }

  // There are no signals to interrupt a statement with: end the thread. What it had committed is
  // in the log, what it had not is rolled back by the next boot.
  kill(reason) {
    if (this.#worker === null) return
    this.kills++
    this.#died(this.#worker, reason)
  }

  async shutDown() {
    const worker = this.#worker
    if (worker === null) return
    await new Promise((resolve) => {
      this.#onClosed = resolve
      worker.once('exit', resolve)
      this.#send({ kind: 'close' })
    })
    this.#worker = null
    this.database = null
    await worker.terminate()
  }
}

function backendFrameLength(bytes) {
  return bytes.length < HEADER_BYTES ? 0 : bytes.readUInt32BE(1) + 1
}
