// Is a message well formed? A malformed one makes the engine trap (`RuntimeError: unreachable`),
// which would end every session's prepared statements; so each is checked before it gets there.
import { FRONTEND, HEADER_BYTES, ProtocolError } from './wire.mjs'

const MESSAGE_BYTES_MAX = 256 * 1024 * 1024
// As in the server: only messages that carry data or SQL may be large.
const SMALL_MESSAGE_BYTES_MAX = 10_000
const FORMATS = [0, 1]

// Walks over the body of a message; every step fails when the bytes are not there.
class Body {
  constructor(bytes) {
    this.bytes = bytes
    this.at = HEADER_BYTES
  }

  skip(count) {
    if (this.at + count > this.bytes.length) {
      throw new ProtocolError('insufficient data left in message')
    }
    this.at += count
  }

  byte() {
    this.skip(1)
    return this.bytes[this.at - 1]
  }

  int16() {
    this.skip(2)
    return this.bytes.readInt16BE(this.at - 2)
  }

  uint16() {
    this.skip(2)
    return this.bytes.readUInt16BE(this.at - 2)
  }

  int32() {
    this.skip(4)
    return this.bytes.readInt32BE(this.at - 4)
  }

  cstring() {
    const end = this.bytes.indexOf(0, this.at)
    if (end < 0) throw new ProtocolError('invalid string in message')
    this.at = end + 1
  }

  formats() {
    const count = this.uint16()
    for (let index = 0; index < count; index++) {
      const format = this.int16()
      if (!FORMATS.includes(format)) throw new ProtocolError(`unsupported format code: ${format}`)
    }
    return count
  }

  values() {
    const count = this.uint16()
    for (let index = 0; index < count; index++) {
      const length = this.int32()
      if (length < -1) throw new ProtocolError(`invalid value length: ${length}`)
      if (length > 0) this.skip(length)
    }
    return count
  }

  end() {
    if (this.at !== this.bytes.length) throw new ProtocolError('invalid message format')
  }
}

const SHAPES = new Map([
  [FRONTEND.query, (body) => body.cstring()],
  [FRONTEND.parse, walkParse],
  [FRONTEND.bind, walkBind],
  [FRONTEND.execute, walkExecute],
  [FRONTEND.describe, walkTarget],
  [FRONTEND.close, walkTarget],
  [FRONTEND.functionCall, walkFunctionCall],
  [FRONTEND.copyData, (body) => body.skip(body.bytes.length - HEADER_BYTES)],
  [FRONTEND.copyFail, (body) => body.cstring()],
  [FRONTEND.copyDone, () => {}],
  [FRONTEND.sync, () => {}],
  [FRONTEND.flush, () => {}],
  [FRONTEND.terminate, () => {}],
])

const LARGE = new Set([
  FRONTEND.query,
  FRONTEND.parse,
  FRONTEND.bind,
  FRONTEND.functionCall,
  FRONTEND.copyData,
])

function walkParse(body) {
  body.cstring()
  body.cstring()
  const types = body.uint16()
  body.skip(4 * types)
}

function walkBind(body) {
  body.cstring()
  body.cstring()
  const formats = body.formats()
  const values = body.values()
  if (formats > 1 && formats !== values) {
    throw new ProtocolError(`bind message has ${formats} parameter formats but ${values} parameters`)
  }
  body.formats()
}

function walkExecute(body) {
  body.cstring()
  body.int32()
}

function walkTarget(body) {
  const target = String.fromCharCode(body.byte())
  if (target !== 'S' && target !== 'P') throw new ProtocolError('invalid statement or portal target')
  body.cstring()
}

function walkFunctionCall(body) {
  body.int32()
  const formats = body.formats()
  const values = body.values()
  if (formats > 1 && formats !== values) {
    throw new ProtocolError(`function call has ${formats} argument formats but ${values} arguments`)
  }
  const format = body.int16()
  if (!FORMATS.includes(format)) throw new ProtocolError(`unsupported format code: ${format}`)
}

// Returns the length of the frame that `bytes` begin with, 0 when that cannot be told yet.
export function frontendFrameLength(bytes) {
  if (bytes.length === 0) return 0
  if (!SHAPES.has(bytes[0])) throw new ProtocolError(`invalid frontend message type ${bytes[0]}`)
  if (bytes.length < HEADER_BYTES) return 0
  const length = bytes.readInt32BE(1)
  const max = LARGE.has(bytes[0]) ? MESSAGE_BYTES_MAX : SMALL_MESSAGE_BYTES_MAX
  if (length < 4 || length > max) throw new ProtocolError(`invalid message length ${length}`)
  return length + 1
}

// Returns the type of a well-formed message; throws otherwise.
export function checkMessage(bytes) {
  const body = new Body(bytes)
  SHAPES.get(bytes[0])(body)
  body.end()
  return bytes[0]
}
