// Who has the engine, and who is next.
//
// A session owns the engine from the first message of a transaction to its end; between
// transactions it passes on in the order of arrival. Sessions of the database that is open go
// first for a moment, because opening another takes as long as hundreds of statements.

const SAME_DATABASE_FIRST_MS = 100
const WATCH_EVERY_MS = 200
const FALLBACK_DATABASE = 'postgres'

// A task has: turn() that uses the engine; hasWork; database, null for whatever is open, if any;
// mayOpen() that tells whether that database is still there; refuse() for when it does not open.
export class Scheduler {
  #engine
  #log
  #queue = []
  #running = false
  #openedAt = 0
  owner = null
  // Something has run since the last checkpoint, see upkeep.mjs.
  active = false

  constructor(engine, log) {
    this.#engine = engine
    this.#log = log
    setInterval(() => this.owner?.watchIdle(performance.now()), WATCH_EVERY_MS).unref()
  }

  request(task) {
    if (!task.queued) {
      task.queued = true
      this.#queue.push(task)
    }
    if (!this.#running) this.#run()
  }

  own(session) {
    this.owner = session
  }

  release(session) {
    if (this.owner === session) this.owner = null
  }

  async #run() {
    this.#running = true
    for (let task = this.#next(); task !== null; task = this.#next()) {
      task.queued = false
      try {
        if (await this.#open(task)) await task.turn()
      } catch (error) {
        // Only a mistake in the bridge itself arrives here; the supervisor starts it afresh.
        this.#log('bridge failed', { error: error.stack })
        process.exit(70)
      }
      if (task.hasWork && !task.queued) {
        task.queued = true
        this.#queue.push(task)
      }
    }
    this.#running = false
  }

  #next() {
    if (this.#queue.length === 0) return null
    let index = 0
    if (this.owner !== null) {
      index = this.#queue.indexOf(this.owner)
    } else if (performance.now() - this.#openedAt < SAME_DATABASE_FIRST_MS) {
      const open = this.#engine.database
      const same = this.#queue.findIndex(
        (task) => task.database === null || task.database === open,
      )
      index = Math.max(same, 0)
    }
    if (index < 0) return null
    return index === 0 ? this.#queue.shift() : this.#queue.splice(index, 1)[0]
  }

  // Opens the database that the task wants. Returns false when the task was refused instead.
  async #open(task) {
    const wanted = task.database
    if (wanted === null || wanted === this.#engine.database) return true
    if (!task.mayOpen(wanted)) return false
    try {
      await this.reopen(wanted)
      return true
    } catch (error) {
      this.#log('database does not open', { database: wanted, error: error.message })
      if (wanted === FALLBACK_DATABASE) throw error
      task.refuse('57P03', `database "${wanted}" could not be opened`)
      return false
    }
  }

  async reopen(database) {
    await this.#engine.shutDown()
    await this.#engine.boot(database)
    this.#openedAt = performance.now()
  }
}

