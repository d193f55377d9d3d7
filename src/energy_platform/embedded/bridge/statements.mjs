// The prepared statements of one session, in an engine that holds those of all sessions.
//
// A client's names are mapped to names that no other session has. The Parse message of each
// statement is kept, because the engine forgets statements when it boots, when any session runs
// DEALLOCATE ALL, and the unnamed one at every simple query: it is then parsed again, unseen, in
// front of the message that uses it.
import { editSql } from './commands.mjs'
import { SETTING_NAME, EFFECT, classify } from './sql.mjs'
import {
  FRONTEND,
  HEADER_BYTES,
  closeStatementMessage,
  cstring,
  isFollowedByReady,
  message,
  readCString,
} from './wire.mjs'

const STATEMENT = 'S'.charCodeAt(0)
const PARAMETER_NAME_LENGTH_MAX = 64

export class Statements {
  #engine
  #prefix
  #count = 0
  #byName = new Map()
  #unnamed = null

  constructor(engine, sessionId) {
    this.#engine = engine
    this.#prefix = `~${sessionId}~`
  }

  // Returns the group as the engine must see it, see Group.
  prepare(messages, session) {
    return new Group(this, messages, session)
  }

  find(name) {
    return (name === '' ? this.#unnamed : this.#byName.get(name)) ?? null
  }

  create(name) {
    const engineName = name === '' ? '' : `${this.#prefix}${++this.#count}`
    return { engineName, parse: null, meaning: null, epoch: 0 }
  }

  // A statement as the engine must have it: is it there?
  isKnown(statement) {
    return statement.engineName === ''
      ? this.#engine.unnamedOwner === this
      : statement.epoch === this.#engine.statementEpoch
  }

  parsed(statement) {
    statement.epoch = this.#engine.statementEpoch
    if (statement.engineName === '') this.#engine.unnamedOwner = this
  }

  store(name, statement) {
    this.parsed(statement)
    if (name === '') this.#unnamed = statement
    else this.#byName.set(name, statement)
  }

  // Forgets a name, unless it has been given to another statement meanwhile.
  forget(name, statement) {
    if (name === '') this.#unnamed = null
    else if (this.#byName.get(name) === statement) this.#byName.delete(name)
  }

  forgetUnnamed() {
    this.#unnamed = null
    this.#engine.unnamedOwner = null
  }

  // The engine has forgotten every statement: this session's for good, the others' until used.
  forgetAll() {
    this.#byName.clear()
    this.#engine.statementEpoch++
  }

  // The messages that take this session's statements out of the engine.
  closeMessages() {
    const left = [...this.#byName.values()].filter((statement) => this.isKnown(statement))
    return left.map((statement) => closeStatementMessage(statement.engineName))
  }
}

// A group of messages, rewritten for the engine.
//
// bytes: what to send. replies: for each ParseComplete and CloseComplete to come, in order, what
// it means and whether the client expects it. effects, settingNames: what may have changed, see
// sql.mjs. endsInReady: a ReadyForQuery will follow. hasQuery: it is a simple query. isOnlyFlush: it
// asks for nothing but what has been answered already.
class Group {
  #statements
  #session
  // What the group itself has parsed or closed, before the engine has said so.
  #ahead = new Map()
  #present = new Set()
  #deallocated = []
  #parts = []
  replies = []
  effects = 0
  settingNames = []

  constructor(statements, messages, session) {
    this.#statements = statements
    this.#session = session
    for (const bytes of messages) this.#add(bytes)
    const last = messages.at(-1)[0]
    this.hasQuery = last === FRONTEND.query
    this.isOnlyFlush = messages.length === 1 && last === FRONTEND.flush
    this.endsInReady = isFollowedByReady(last)
    this.bytes = this.#parts.length === 1 ? this.#parts[0] : Buffer.concat(this.#parts)
  }

  #add(bytes) {
    switch (bytes[0]) {
      case FRONTEND.query:
        return this.#addQuery(bytes)
      case FRONTEND.parse:
        return this.#addParse(bytes)
      case FRONTEND.bind:
        return this.#addBind(bytes)
      case FRONTEND.describe:
      case FRONTEND.close:
        return this.#addTarget(bytes)
      default:
        this.#parts.push(bytes)
    }
  }

  #addQuery(bytes) {
    const sql = bytes.latin1Slice(HEADER_BYTES, bytes.length - 1)
    const meaning = classify(sql)
    this.#mean(meaning)
    const edited = this.#edit(sql, meaning)
    if (edited === sql) this.#parts.push(bytes)
    else this.#parts.push(message('Q', Buffer.from(edited, 'latin1'), Buffer.from([0])))
  }

  #addParse(bytes) {
    const [name, sqlAt] = readCString(bytes, HEADER_BYTES)
    const sqlEnd = bytes.indexOf(0, sqlAt)
    const sql = bytes.latin1Slice(sqlAt, sqlEnd)
    const existing = name === '' ? null : this.#find(name)
    // A name that is taken is left to the engine to refuse.
    if (existing) this.#parseAgain(existing)
    const statement = existing ? { ...existing } : this.#statements.create(name)
    statement.meaning = classify(sql)
    this.#mean(statement.meaning)
    const edited = this.#edit(sql, statement.meaning)
    statement.parse = message(
      'P',
      cstring(statement.engineName),
      edited === sql ? bytes.subarray(sqlAt, sqlEnd) : Buffer.from(edited, 'latin1'),
      bytes.subarray(sqlEnd),
    )
    this.#parts.push(statement.parse)
    this.#ahead.set(name, statement)
    this.#present.add(statement)
    this.replies.push({ shown: true, commit: () => this.#statements.store(name, statement) })
  }

  #addBind(bytes) {
    const portalEnd = bytes.indexOf(0, HEADER_BYTES) + 1
    const [name, valuesAt] = readCString(bytes, portalEnd)
    const statement = this.#find(name)
    // An unknown name may be one that SQL's own PREPARE made; else the engine refuses it.
    if (!statement) return this.#parts.push(bytes)
    this.#parseAgain(statement)
    this.#mean(statement.meaning)
    if (statement.meaning.effects & EFFECT.settingsByName) {
      this.settingNames.push(...settingNamesAmong(bytes, valuesAt))
    }
    if (name === '') return this.#parts.push(bytes)
    const portal = bytes.subarray(HEADER_BYTES, portalEnd)
    const values = bytes.subarray(valuesAt)
    this.#parts.push(message('B', portal, cstring(statement.engineName), values))
  }

  #addTarget(bytes) {
    const closes = bytes[0] === FRONTEND.close
    const [name] = readCString(bytes, HEADER_BYTES + 1)
    // Portals last no longer than a transaction, so their names need no care.
    const statement = bytes[HEADER_BYTES] === STATEMENT ? this.#find(name) : null
    if (!statement) {
      if (closes) this.replies.push({ shown: true, commit: () => {} })
      return this.#parts.push(bytes)
    }
    if (closes) {
      this.#ahead.set(name, null)
      const commit = () => this.#statements.forget(name, statement)
      this.replies.push({ shown: true, commit })
      this.#parts.push(closeStatementMessage(statement.engineName))
    } else {
      this.#parseAgain(statement)
      this.#parts.push(message('D', Buffer.from('S'), cstring(statement.engineName)))
    }
  }

  #find(name) {
    return this.#ahead.has(name) ? this.#ahead.get(name) : this.#statements.find(name)
  }

  #parseAgain(statement) {
    if (this.#present.has(statement) || this.#statements.isKnown(statement)) return
    this.#parts.push(statement.parse)
    this.#present.add(statement)
    this.replies.push({ shown: false, commit: () => this.#statements.parsed(statement) })
  }

  #edit(sql, meaning) {
    if (meaning.edits.length === 0) return sql
    for (const edit of meaning.edits) {
      const statement = edit.kind === 'deallocate' ? this.#find(edit.name) : null
      if (!statement) continue
      // In a failed transaction nothing can be parsed, and DEALLOCATE will fail as well.
      if (this.#session.status !== 'E') this.#parseAgain(statement)
      this.#deallocated.push([edit.name, statement])
    }
    return editSql(sql, meaning.edits, this.#session, (name) => this.#find(name))
  }

  // To be called when the group has run without an error.
  succeeded() {
    for (const [name, statement] of this.#deallocated) this.#statements.forget(name, statement)
  }

  #mean(meaning) {
    this.effects |= meaning.effects
    if (meaning.settingNames.length > 0) this.settingNames.push(...meaning.settingNames)
  }
}

// A parameter of set_config() may be the name of a setting: whatever looks like one is followed.
function* settingNamesAmong(bytes, valuesAt) {
  let at = valuesAt
  at += 2 + 2 * bytes.readUInt16BE(at)
  const count = bytes.readUInt16BE(at)
  at += 2
  for (let index = 0; index < count; index++) {
    const length = bytes.readInt32BE(at)
    at += 4
    if (length <= 0) continue
    if (length <= PARAMETER_NAME_LENGTH_MAX) {
      const text = bytes.latin1Slice(at, at + length)
      if (text.includes('.') && SETTING_NAME.test(text)) yield text
    }
    at += length
  }
}
