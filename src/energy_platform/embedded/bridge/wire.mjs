// PostgreSQL protocol version 3: types, encoding, decoding and framing of messages.

const code = (letter) => letter.charCodeAt(0)

export const FRONTEND = {
  bind: code('B'),
  close: code('C'),
  copyData: code('d'),
  copyDone: code('c'),
  copyFail: code('f'),
  describe: code('D'),
  execute: code('E'),
  flush: code('H'),
  functionCall: code('F'),
  parse: code('P'),
  query: code('Q'),
  sync: code('S'),
  terminate: code('X'),
}

export const BACKEND = {
  closeComplete: code('3'),
  commandComplete: code('C'),
  copyInResponse: code('G'),
  dataRow: code('D'),
  error: code('E'),
  notification: code('A'),
  parameterStatus: code('S'),
  parseComplete: code('1'),
  readyForQuery: code('Z'),
  rowDescription: code('T'),
}

export const STARTUP = {
  cancelRequest: 80877102,
  sslRequest: 80877103,
  gssEncRequest: 80877104,
  protocolMajor: 3,
}

// What the engine thread and the main thread share without sending a message.
export const CONTROL = { requests: 0, chunksAhead: 1, syncs: 2, heapPages: 3, length: 4 }
export const HEAP_PAGE_BYTES = 65_536

export const HEADER_BYTES = 5

// After these the engine says that it is ready; after a Flush it says nothing of the kind.
const FOLLOWED_BY_READY = new Set([FRONTEND.query, FRONTEND.sync, FRONTEND.functionCall])
export const isFollowedByReady = (type) => FOLLOWED_BY_READY.has(type)

// What a client has sent is not PostgreSQL's protocol.
export class ProtocolError extends Error {}

// ---- encoding

export const cstring = (text) => Buffer.from(`${text}\0`)

export function int32(value) {
  const bytes = Buffer.alloc(4)
  bytes.writeInt32BE(value)
  return bytes
}

export function message(letter, ...parts) {
  const length = parts.reduce((sum, part) => sum + part.length, 0)
  const bytes = Buffer.allocUnsafe(HEADER_BYTES + length)
  bytes[0] = code(letter)
  bytes.writeInt32BE(length + 4, 1)
  let at = HEADER_BYTES
  for (const part of parts) {
    bytes.set(part, at)
    at += part.length
  }
  return bytes
}

export const queryMessage = (sql) => message('Q', cstring(sql))
export const syncMessage = () => message('S')
export const closeStatementMessage = (name) => message('C', Buffer.from('S'), cstring(name))
export const copyFailMessage = (reason) => message('f', cstring(reason))

export const authenticationOk = () => message('R', int32(0))
export const parameterStatus = (name, value) => message('S', cstring(name), cstring(value))
export const backendKey = (pid, secret) => message('K', int32(pid), int32(secret))
export const readyForQuery = (status) => message('Z', Buffer.from(status))
// Tells a newer client that version 3.0 is spoken, and none of its options is known.
export const negotiateVersion = (options) =>
  message('v', int32(STARTUP.protocolMajor << 16), int32(options.length), ...options.map(cstring))

export function errorResponse({ severity = 'ERROR', sqlstate, text, detail, hint }) {
  const fields = [`S${severity}`, `V${severity}`, `C${sqlstate}`, `M${text}`]
  if (detail) fields.push(`D${detail}`)
  if (hint) fields.push(`H${hint}`)
  return message('E', ...fields.map(cstring), Buffer.from([0]))
}

// Standard-conforming strings are on in every statement that the bridge itself sends.
export const quoteLiteral = (text) => `'${String(text).replaceAll("'", "''")}'`
export const quoteIdentifier = (text) => `"${String(text).replaceAll('"', '""')}"`

// ---- decoding

// Returns the text at `at` and the position after its terminating zero.
export function readCString(bytes, at) {
  const end = bytes.indexOf(0, at)
  if (end < 0) throw new ProtocolError('invalid string in message')
  return [bytes.toString('utf8', at, end), end + 1]
}

export function readErrorFields(bytes) {
  const fields = {}
  let at = HEADER_BYTES
  while (bytes[at] !== 0) {
    const key = String.fromCharCode(bytes[at])
    ;[fields[key], at] = readCString(bytes, at + 1)
  }
  return fields
}

export function readDataRow(bytes) {
  const count = bytes.readInt16BE(HEADER_BYTES)
  const values = []
  let at = HEADER_BYTES + 2
  for (let index = 0; index < count; index++) {
    const length = bytes.readInt32BE(at)
    at += 4
    values.push(length < 0 ? null : bytes.toString('utf8', at, at + length))
    at += Math.max(length, 0)
  }
  return values
}

// ---- framing

// Cuts a byte stream into messages. Bytes of an unfinished message are kept in pieces and joined
// once, because joining at every arrival would copy a large message hundreds of times.
export class FrameReader {
  #pieces = []
  #have = 0
  #need = 0

  // `lengthAt(bytes)` returns the length of the frame that `bytes` begin with, or 0 when too few
  // bytes are there to tell; it throws when no valid frame can begin so.
  constructor(lengthAt) {
    this.lengthAt = lengthAt
  }

  push(piece) {
    this.#pieces.push(piece)
    this.#have += piece.length
  }

  // Returns the next whole frame, or null when more bytes are needed.
  next() {
    if (this.#have === 0 || this.#have < this.#need) return null
    const bytes = this.#pieces.length === 1 ? this.#pieces[0] : Buffer.concat(this.#pieces)
    const length = this.lengthAt(bytes)
    if (length === 0 || bytes.length < length) {
      this.#pieces = [bytes]
      this.#need = length === 0 ? bytes.length + 1 : length
      return null
    }
    this.#need = 0
    this.#have = bytes.length - length
    this.#pieces = this.#have > 0 ? [bytes.subarray(length)] : []
    return bytes.subarray(0, length)
  }

  // Gives up framing, and returns the bytes that are left.
  takeRest() {
    const rest = Buffer.concat(this.#pieces)
    this.#pieces = []
    this.#have = this.#need = 0
    return rest
  }
}
