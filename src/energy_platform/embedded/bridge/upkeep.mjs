// What a server's background processes would do: keep the write-ahead log short, and the memory.
import { SUPERUSER_STATE, applyState } from './settings.mjs'
import { quoteLiteral } from './wire.mjs'

const LOOK_EVERY_MS = 1000
// Without a checkpoint a minute of load leaves hundreds of megabytes that a boot must replay.
const LOG_BYTES_MAX = 48 * 1024 * 1024
const CHECKPOINT_AGE_MAX_MS = 60_000
// The engine's memory only grows, up to 2 GB; a new engine begins with 250 MB.
const HEAP_BYTES_MAX = 1024 * 1024 * 1024

export class Upkeep {
  #engine
  #scheduler
  #log
  // Where the log was at the last checkpoint; a boot ends with one.
  #position = null
  #checkpointedAt = performance.now()
  // A task of the scheduler, in whatever database is open.
  queued = false
  database = null
  hasWork = false

  constructor(engine, scheduler, log) {
    this.#engine = engine
    this.#scheduler = scheduler
    this.#log = log
    setInterval(() => this.#look(), LOOK_EVERY_MS).unref()
  }

  #look() {
    if (this.#scheduler.active) this.#scheduler.request(this)
  }

  mayOpen() {
    return true
  }

  refuse() {}

  async turn() {
    if (!this.#engine.running) return
    await this.#checkpoint()
    const { heapBytes, database } = this.#engine
    if (heapBytes > HEAP_BYTES_MAX) {
      this.#log('memory given back', { heap_bytes: heapBytes })
      await this.#scheduler.reopen(database)
    }
  }

  async #checkpoint() {
    this.#position ??= await this.#currentPosition()
    if (this.#position === null) return
    const since = performance.now()
    const isOld = since - this.#checkpointedAt > CHECKPOINT_AGE_MAX_MS
    const bytes = await this.#bytesSinceLast()
    if (bytes > LOG_BYTES_MAX || (isOld && bytes > 0)) {
      await applyState(this.#engine, SUPERUSER_STATE)
      const { error } = await this.#engine.query('CHECKPOINT')
      if (error) return this.#log('checkpoint failed', { error: error.M })
      this.#log('checkpoint', { bytes, duration_ms: Math.round(performance.now() - since) })
      this.#position = await this.#currentPosition()
      this.#checkpointedAt = performance.now()
    }
    if (isOld) this.#scheduler.active = false
  }

  async #bytesSinceLast() {
    const { rows } = await this.#engine.query(
      'SELECT pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), ' +
        `${quoteLiteral(this.#position)})::bigint`,
    )
    return Number(rows[0]?.[0] ?? 0)
  }

  async #currentPosition() {
    const { rows } = await this.#engine.query('SELECT pg_catalog.pg_current_wal_lsn()')
    return rows[0]?.[0] ?? null
  }
}
