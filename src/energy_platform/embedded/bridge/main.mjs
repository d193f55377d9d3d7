// The embedded engine's process: a TimescaleDB in a folder, behind a Unix socket.
//
//   node main.mjs --modules DIR --data DIR --socket PATH --fsync on|off
//
// It prints one line of JSON on standard output when it serves, or when it cannot. Its standard
// input is a leash: when that closes, the parent has gone, and it shuts down. A line `statistics`
// on it is answered with a line of JSON.
import fs from 'node:fs'
import net from 'node:net'
import path from 'node:path'
import readline from 'node:readline'
import { parseArgs } from 'node:util'

import { Catalog } from './catalog.mjs'
import { prepareCluster } from './cluster.mjs'
import { Engine } from './engine.mjs'
import { Registry } from './registry.mjs'
import { Scheduler } from './scheduler.mjs'
import { Session } from './session.mjs'
import { Upkeep } from './upkeep.mjs'

// A parent that starts again on the folder waits ten seconds for this process to leave it.
const STATEMENT_ENDS_WITHIN_MS = 3000
const SHUTDOWN_WITHIN_MS = 8000
const LOOK_AT_PARENT_EVERY_MS = 1000

const { values: options } = parseArgs({
  options: {
    modules: { type: 'string' },
    data: { type: 'string' },
    socket: { type: 'string' },
    fsync: { type: 'string', default: 'on' },
  },
})

function log(event, fields = {}) {
  const line = { time: new Date().toISOString(), event, ...fields }
  process.stderr.write(`${JSON.stringify(line)}\n`)
}

const say = (fields) => process.stdout.write(`${JSON.stringify(fields)}\n`)

const startedAt = performance.now()
const modulesDir = path.resolve(options.modules)
const dataDir = path.resolve(options.data)
const fsync = options.fsync === 'on'
const engine = new Engine({ modulesDir, dataDir, fsync, log })
const catalog = new Catalog()
const scheduler = new Scheduler(engine, log)
const sessions = new Registry()
const bridge = { engine, catalog, scheduler, sessions, log }
const server = net.createServer((socket) => new Session(bridge, socket, sessions.nextPid()))
let stopping = false

try {
  const created = prepareCluster({ template: path.join(modulesDir, 'cluster'), dataDir, fsync })
  await engine.boot('postgres')
  await catalog.loadDefaults(engine)
  await catalog.load(engine)
  await listen(options.socket)
  new Upkeep(engine, scheduler, log)
  holdLeash()
  const bootMs = Math.round(performance.now() - startedAt)
  log('serving', { created, boot_ms: bootMs, pid: process.pid })
  say({ ready: true, created, boot_ms: bootMs })
} catch (error) {
  log('start failed', { error: error.stack })
  say({ ready: false, error: error.message })
  process.exitCode = 1
  process.exit()
}

// The folder is locked by the parent, so a socket that is there belongs to nobody.
function listen(socketPath) {
  fs.rmSync(socketPath, { force: true })
  const mask = process.umask(0o177)
  return new Promise((resolve, reject) => {
    server.once('error', reject)
    server.listen(socketPath, () => {
      process.umask(mask)
      resolve()
    })
  })
}

function holdLeash() {
  const commands = readline.createInterface({ input: process.stdin })
  commands.on('line', (line) => {
    if (line === 'statistics') say(statistics())
  })
  commands.on('close', () => stop('the parent has closed the leash'))
  process.on('SIGTERM', () => stop('SIGTERM'))
  // A process that the parent had forked may hold the other end of the leash open.
  const parent = process.ppid
  setInterval(() => {
    if (process.ppid !== parent) stop('the parent has ended')
  }, LOOK_AT_PARENT_EVERY_MS).unref()
}

function statistics() {
  const { boots, kills, runs, syncs, heapBytes, database } = engine
  const owner = scheduler.owner?.describe() ?? null
  return {
    ...{ boots, kills, runs, syncs, heap_bytes: heapBytes, database },
    ...{ sessions: sessions.size, owner },
  }
}

async function stop(reason) {
  if (stopping) return
  stopping = true
  log('stopping', { reason })
  setTimeout(() => engine.kill('shutting down'), STATEMENT_ENDS_WITHIN_MS).unref()
  setTimeout(() => process.exit(1), SHUTDOWN_WITHIN_MS).unref()
  server.close()
  for (const session of sessions.all()) {
    session.fatal('57P01', 'terminating connection due to administrator command')
  }
  await new Promise((resolve) => scheduler.request(shutDownTask(resolve)))
  log('stopped')
  process.exit(0)
}

// Behind the clean-up of the sessions that have just been ended, in the order of arrival.
function shutDownTask(resolve) {
  return {
    queued: false,
    database: null,
    hasWork: false,
    mayOpen: () => true,
    refuse: () => {},
    turn: async () => {
      await engine.shutDown()
      resolve()
      // Nothing may boot it again.
      await new Promise(() => {})
    },
  }
}
