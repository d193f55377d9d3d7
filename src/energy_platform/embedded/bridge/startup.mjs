// The first bytes of a connection: requests for encryption, cancellation, and who wants what.
import { FrameReader, ProtocolError, STARTUP, readCString } from './wire.mjs'

const STARTUP_BYTES_MAX = 10_000
const LENGTH_BYTES = 4
const NOT_SETTINGS = new Set(['user', 'database', 'options', 'replication'])
const PROTOCOL_OPTION = '_pq_.'

export class Startup {
  #frames = new FrameReader(startupFrameLength)
  done = false
  parameters = new Map()
  unknownOptions = []
  minorVersion = 0
  // What had already been sent after the startup message.
  rest = Buffer.alloc(0)

  // Returns { replies, cancel, refusal }: what to answer; whom to cancel; why to refuse.
  push(bytes) {
    const step = { replies: [], cancel: null, refusal: null }
    this.#frames.push(bytes)
    let frame
    while (!this.done && !step.cancel && !step.refusal && (frame = this.#frames.next())) {
      this.#read(frame, step)
    }
    if (this.done) this.rest = this.#frames.takeRest()
    return step
  }

  #read(frame, step) {
    const code = frame.readInt32BE(LENGTH_BYTES)
    if (code === STARTUP.sslRequest || code === STARTUP.gssEncRequest) {
      // A private socket needs no encryption.
      step.replies.push(Buffer.from('N'))
    } else if (code === STARTUP.cancelRequest) {
      if (frame.length !== 16) throw new ProtocolError('invalid length of cancel request')
      step.cancel = { pid: frame.readInt32BE(8), secret: frame.readInt32BE(12) }
    } else if (code >> 16 !== STARTUP.protocolMajor) {
      const version = `${code >> 16}.${code & 0xffff}`
      step.refusal = { sqlstate: '0A000', text: `unsupported frontend protocol ${version}` }
    } else {
      this.#readParameters(frame, code & 0xffff, step)
    }
  }

  #readParameters(frame, minorVersion, step) {
    this.minorVersion = minorVersion
    let at = 8
    while (at < frame.length && frame[at] !== 0) {
      const [name, valueAt] = readCString(frame, at)
      const [value, next] = readCString(frame, valueAt)
      if (name.startsWith(PROTOCOL_OPTION)) this.unknownOptions.push(name)
      else this.parameters.set(name, value)
      at = next
    }
    if (at !== frame.length - 1) throw new ProtocolError('invalid startup packet layout')
    const replication = this.parameters.get('replication') ?? 'false'
    if (!/^(?:false|off|no|0)$/i.test(replication)) {
      const text = 'replication is not supported by the embedded engine'
      step.refusal = { sqlstate: '0A000', text }
    } else if (!this.parameters.get('user')) {
      const text = 'no PostgreSQL user name specified in startup packet'
      step.refusal = { sqlstate: '28000', text }
    } else {
      this.done = true
    }
  }
}

function startupFrameLength(bytes) {
  if (bytes.length < LENGTH_BYTES) return 0
  const length = bytes.readInt32BE(0)
  if (length < 8 || length > STARTUP_BYTES_MAX) {
    throw new ProtocolError('invalid length of startup packet')
  }
  return length
}

// The settings that the client asks for: as parameters of their own, or in `options` as a command
// line (`-c name=value`, `--name=value`). A backslash keeps the character after it.
export function requestedSettings(parameters) {
  const settings = new Map()
  const words = splitWords(parameters.get('options') ?? '')
  for (let index = 0; index < words.length; index++) {
    let assignment = words[index]
    if (assignment === '-c') assignment = words[++index] ?? ''
    else if (assignment.startsWith('-c')) assignment = assignment.slice(2)
    else if (assignment.startsWith('--')) assignment = assignment.slice(2)
    else throw new ProtocolError(`invalid command-line argument: ${assignment}`)
    const at = assignment.indexOf('=')
    if (at < 1) throw new ProtocolError(`invalid command-line argument: ${words[index]}`)
    settings.set(assignment.slice(0, at).replaceAll('-', '_'), assignment.slice(at + 1))
  }
  for (const [name, value] of parameters) if (!NOT_SETTINGS.has(name)) settings.set(name, value)
  return settings
}

function splitWords(text) {
  const words = text.match(/(?:\\[^]|[^\\\s])+/g) ?? []
  return words.map((word) => word.replace(/\\([^])/g, '$1'))
}
