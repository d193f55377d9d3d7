// Looks through the engine's answer on its way to a client.
//
// Rows pass without being copied or even completed; only the few kinds of message that the bridge
// must see are taken apart, and it may withhold them.
import { BACKEND, HEADER_BYTES } from './wire.mjs'

const INSPECTED = new Set([
  BACKEND.closeComplete,
  BACKEND.commandComplete,
  BACKEND.error,
  BACKEND.notification,
  BACKEND.parameterStatus,
  BACKEND.parseComplete,
  BACKEND.readyForQuery,
])

export class ReplyScanner {
  #inspect
  #skip = 0
  #tail = null

  // inspect(type, message) returns whether the client shall have the message.
  constructor(inspect) {
    this.#inspect = inspect
  }

  // The client has a part of a message, and waits for the rest before it reads anything else.
  get isMidMessage() {
    return this.#skip > 0
  }

  // Returns the parts of the chunk that may be passed on.
  push(piece) {
    let chunk = piece
    if (this.#tail) {
      chunk = Buffer.concat([this.#tail, piece])
      this.#tail = null
    }
    const passed = []
    let at = Math.min(this.#skip, chunk.length)
    this.#skip -= at
    let passedTo = 0
    const pass = (end) => {
      if (end > passedTo) passed.push(chunk.subarray(passedTo, end))
    }
    while (chunk.length - at >= HEADER_BYTES) {
      const type = chunk[at]
      const end = at + 1 + chunk.readUInt32BE(at + 1)
      if (!INSPECTED.has(type)) {
        at = Math.min(end, chunk.length)
        this.#skip = end - at
        continue
      }
      if (end > chunk.length) break
      if (!this.#inspect(type, chunk.subarray(at, end))) {
        pass(at)
        passedTo = end
      }
      at = end
    }
    pass(at)
    if (at < chunk.length) this.#tail = Buffer.from(chunk.subarray(at))
    return passed
  }
}
