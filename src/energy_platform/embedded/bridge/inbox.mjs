// What a client has sent and the engine has not yet taken, in the order in which it came.
//
// The engine is given whole groups only: up to a Query, Sync, Flush or FunctionCall, after which
// a client may wait for an answer. While a COPY runs, the same stream feeds it.
import { FRONTEND } from './wire.mjs'

const ENDS_GROUP = new Set([
  FRONTEND.query,
  FRONTEND.sync,
  FRONTEND.flush,
  FRONTEND.functionCall,
  FRONTEND.terminate,
])
const COPY_MESSAGES = new Set([FRONTEND.copyData, FRONTEND.copyDone, FRONTEND.copyFail])
// Native servers ignore these two while a COPY runs; so does the engine.
const IGNORED_IN_COPY = new Set([FRONTEND.sync, FRONTEND.flush])
const COPY_FEED_BYTES_MAX = 4 * 1024 * 1024

export class Inbox {
  #messages = []
  #groups = 0
  bytes = 0

  get hasGroup() {
    return this.#groups > 0
  }

  get isEmpty() {
    return this.#messages.length === 0
  }

  add(message) {
    this.#messages.push(message)
    this.bytes += message.length
    if (ENDS_GROUP.has(message[0])) this.#groups++
  }

  clear() {
    this.#messages = []
    this.#groups = 0
    this.bytes = 0
  }

  // Takes the next group. COPY messages outside of a COPY are dropped, as the protocol asks: they
  // are what a client still sent when its COPY had failed.
  takeGroup() {
    const end = this.#messages.findIndex((message) => ENDS_GROUP.has(message[0])) + 1
    return this.#take(end).filter((message) => !COPY_MESSAGES.has(message[0]))
  }

  // Takes what a running COPY can be fed: COPY messages, up to the one that ends it.
  // Returns null when a message of another kind is next, [] when there is none at all.
  takeCopyInput() {
    let end = 0
    let bytes = 0
    while (end < this.#messages.length && bytes < COPY_FEED_BYTES_MAX) {
      const type = this.#messages[end][0]
      if (!COPY_MESSAGES.has(type) && !IGNORED_IN_COPY.has(type)) break
      bytes += this.#messages[end].length
      end++
      if (type !== FRONTEND.copyData) break
    }
    if (end === 0 && this.#messages.length > 0) return null
    return this.#take(end)
  }

  #take(count) {
    const taken = this.#messages.splice(0, count)
    for (const message of taken) {
      this.bytes -= message.length
      if (ENDS_GROUP.has(message[0])) this.#groups--
    }
    return taken
  }
}
