// What does a piece of SQL mean to the bridge?
//
// Nearly all SQL means nothing to it and passes unread. A few commands must be followed, because
// they change what belongs to a session or to the cluster; a few must be rewritten, because one
// engine serves all sessions. Text is latin1 here, one character a byte, so that positions are
// byte positions and any encoding survives.

// What may have changed after a statement; the flags of a group are joined with `|`.
export const EFFECT = {
  settings: 1, // session settings that outlive the transaction
  reported: 2, // settings that the client is told of
  timeouts: 4, // settings that the bridge itself obeys
  catalog: 8, // roles, databases, or their settings
  settingsByName: 16, // settings whose names arrive as parameters
}

const NOTHING = Object.freeze({ effects: 0, edits: [], settingNames: [] })

const MIGHT_MATTER = new RegExp(
  '\\b(?:SET|RESET|DISCARD|DEALLOCATE|LISTEN|DO|CALL|EXECUTE|ROLE|USER|GROUP|DATABASE|' +
    'SET_CONFIG|PG_DATABASE|PG_AUTHID|PG_DB_ROLE_SETTING)\\b',
  'i',
)
const REPORTED_SETTING = new RegExp(
  '\\b(?:TIME\\s*ZONE|DATESTYLE|INTERVALSTYLE|CLIENT_ENCODING|NAMES|APPLICATION_NAME|' +
    'DEFAULT_TRANSACTION_READ_ONLY|STANDARD_CONFORMING_STRINGS|ROLE|AUTHORIZATION|' +
    'SESSION_AUTHORIZATION|CHARACTERISTICS|ALL|SET_CONFIG)\\b',
  'i',
)
const TIMEOUT_SETTING =
  /\b(?:STATEMENT_TIMEOUT|IDLE_IN_TRANSACTION_SESSION_TIMEOUT|ALL|SET_CONFIG)\b/i
const CUSTOM_SETTING = /\b[a-z_][\w$]*(?:\.[a-z_][\w$]*)+\b/gi
export const SETTING_NAME = /^[a-z_][\w$]*(?:\.[a-z_][\w$]*)*$/i

const CACHED_TEXT_LENGTH_MAX = 4096
const CACHED_TEXTS_MAX = 1000
const cache = new Map()

// Returns { effects, edits, settingNames } of a text of one or more statements.
export function classify(sql) {
  if (sql.length > CACHED_TEXT_LENGTH_MAX) return classifyAfresh(sql)
  let meaning = cache.get(sql)
  if (meaning === undefined) {
    meaning = classifyAfresh(sql)
    if (cache.size >= CACHED_TEXTS_MAX) cache.delete(cache.keys().next().value)
    cache.set(sql, meaning)
  }
  return meaning
}

function classifyAfresh(sql) {
  if (!MIGHT_MATTER.test(sql)) return NOTHING
  const meaning = { effects: 0, edits: [], settingNames: [] }
  for (const statement of splitStatements(sql)) classifyStatement(statement, meaning)
  return meaning
}

function classifyStatement(statement, meaning) {
  const [first, second] = [statement.word(0), statement.word(1)]
  const text = statement.text
  const setsLocally = () => {
    if (REPORTED_SETTING.test(text)) meaning.effects |= EFFECT.reported
    if (TIMEOUT_SETTING.test(text)) meaning.effects |= EFFECT.timeouts
  }
  const sets = () => {
    setsLocally()
    meaning.effects |= EFFECT.settings
    meaning.settingNames.push(...(text.match(CUSTOM_SETTING) ?? []))
  }
  switch (first) {
    case 'SET':
      if (second === 'LOCAL') {
        setsLocally()
      } else if (second !== 'TRANSACTION' && second !== 'CONSTRAINTS') {
        sets()
      }
      break
    case 'RESET':
    case 'DISCARD':
      sets()
      break
    case 'DO':
    case 'CALL':
    case 'EXECUTE':
      if (first !== 'DO' || /\b(?:SET|RESET|SET_CONFIG)\b/i.test(text)) sets()
      if (/\b(?:ROLE|USER|GROUP|DATABASE)\b/i.test(text)) meaning.effects |= EFFECT.catalog
      break
    case 'CREATE':
    case 'ALTER':
    case 'DROP':
      if (/^(?:ROLE|USER|GROUP|DATABASE)$/.test(second)) meaning.effects |= EFFECT.catalog
      break
  }
  if (/\bPG_(?:DATABASE|AUTHID|DB_ROLE_SETTING)\b/i.test(text) && first !== 'SELECT') {
    meaning.effects |= EFFECT.catalog
  }
  if (/\bSET_CONFIG\b/i.test(text)) {
    sets()
    meaning.effects |= EFFECT.settingsByName
  }
  const edit = editOf(statement, first, second)
  if (edit) meaning.edits.push({ start: statement.start, end: statement.end, ...edit })
}

// Describes the statement when the bridge must send another one in its place, see commands.mjs.
function editOf(statement, first, second) {
  switch (first) {
    case 'DEALLOCATE': {
      const at = second === 'PREPARE' && statement.tokens.length > 2 ? 2 : 1
      if (statement.word(at) === 'ALL') return null
      return { kind: 'deallocate', name: statement.name(at) }
    }
    case 'LISTEN':
      return { kind: 'listen' }
    case 'CREATE':
      if (second !== 'DATABASE' || /\bSTRATEGY\b/i.test(statement.text)) return null
      return { kind: 'createDatabase' }
    case 'DROP': {
      if (second !== 'DATABASE') return null
      const at = statement.word(2) === 'IF' ? 4 : 2
      const rest = statement.tokens.map((_, index) => statement.word(index)).slice(at + 1)
      const force = rest.includes('FORCE')
      return { kind: 'dropDatabase', name: statement.name(at), force }
    }
    case 'SET':
    case 'RESET':
      return editOfSetting(statement, first)
    default:
      return /\bSET_CONFIG\b/i.test(statement.text) &&
        /\bSESSION_AUTHORIZATION\b/i.test(statement.text)
        ? { kind: 'authorization', name: '' }
        : null
  }
}

function editOfSetting(statement, first) {
  let at = 1
  while (/^(?:SESSION|LOCAL)$/.test(statement.word(at))) at++
  const setting = statement.word(at)
  const value = /^(?:TO|=)$/.test(statement.word(at + 1)) ? at + 2 : at + 1
  const resets = first === 'RESET' || statement.word(value) === 'DEFAULT'
  switch (setting) {
    case 'AUTHORIZATION':
    case 'SESSION_AUTHORIZATION':
      return { kind: 'authorization', name: resets ? null : statement.name(value) }
    case 'NAMES':
    case 'CLIENT_ENCODING':
      return resets ? null : { kind: 'encoding', name: statement.name(value) }
    default:
      return null
  }
}

// ---- lexing

// Only the beginning of a statement tells what it is.
const TOKENS_KEPT = 16

class Statement {
  tokens = []
  start = -1
  end = -1

  constructor(sql) {
    this.sql = sql
  }

  get text() {
    return this.sql.slice(this.start, this.end)
  }

  add(token) {
    if (this.start < 0) this.start = token.start
    this.end = token.end
    if (this.tokens.length < TOKENS_KEPT) this.tokens.push(token)
  }

  // The token as a keyword; '' when there is none, or it is quoted.
  word(index) {
    const token = this.tokens[index]
    if (token === undefined || token.kind === 'quoted' || token.kind === 'string') return ''
    return this.sql.slice(token.start, token.end).toUpperCase()
  }

  // The token as the name it stands for, folded as the engine folds it.
  name(index) {
    const token = this.tokens[index]
    if (token === undefined) return ''
    const raw = Buffer.from(this.sql.slice(token.start, token.end), 'latin1').toString('utf8')
    if (token.kind === 'quoted') return raw.slice(1, -1).replaceAll('""', '"')
    if (token.kind === 'string') return raw.slice(1, -1).replaceAll("''", "'")
    return raw.toLowerCase()
  }
}

function splitStatements(sql) {
  const statements = []
  let statement = new Statement(sql)
  for (const token of tokens(sql)) {
    if (token.kind === 'semicolon') {
      if (statement.start >= 0) statements.push(statement)
      statement = new Statement(sql)
    } else {
      statement.add(token)
    }
  }
  if (statement.start >= 0) statements.push(statement)
  return statements
}

const WORD = /[A-Za-z_\x80-\xff][\w$\x80-\xff]*/y
const NUMBER = /\d[\w.]*/y
const SPACE = /[\s]+/y
const DOLLAR_TAG = /\$(?:[A-Za-z_\x80-\xff][\w\x80-\xff]*)?\$/y

// Long literals are crossed with indexOf: a pattern would need a step for each character.
function* tokens(sql) {
  let at = 0
  const matchEnd = (pattern) => {
    pattern.lastIndex = at
    return pattern.test(sql) ? pattern.lastIndex : -1
  }
  while (at < sql.length) {
    const start = at
    let kind = 'other'
    let end
    if ((end = matchEnd(SPACE)) > 0) {
      at = end
      continue
    } else if (sql.startsWith('--', at)) {
      at = endOf(sql, '\n', at)
      continue
    } else if (sql.startsWith('/*', at)) {
      at = endOfBlockComment(sql, at)
      continue
    } else if (sql[at] === "'") {
      kind = 'string'
      at = endOfQuoted(sql, "'", at)
    } else if (sql[at] === '"') {
      kind = 'quoted'
      at = endOfQuoted(sql, '"', at)
    } else if (/[eE]/.test(sql[at]) && sql[at + 1] === "'") {
      kind = 'string'
      at = endOfEscapeString(sql, at + 2)
    } else if ((end = matchEnd(WORD)) > 0) {
      kind = 'word'
      at = end
    } else if ((end = matchEnd(NUMBER)) > 0) {
      at = end
    } else if (sql[at] === '$' && (end = matchEnd(DOLLAR_TAG)) > 0) {
      kind = 'string'
      at = endOf(sql, sql.slice(at, end), end)
    } else {
      if (sql[at] === ';') kind = 'semicolon'
      at++
    }
    yield { kind, start, end: at }
  }
}

function endOf(sql, terminator, from) {
  const found = sql.indexOf(terminator, from)
  return found < 0 ? sql.length : found + terminator.length
}

function endOfQuoted(sql, quote, at) {
  // A doubled quote ends one literal and begins the next: reading them as two does no harm,
  // except in a name, so names are read on.
  let end = endOf(sql, quote, at + 1)
  while (sql[end] === quote) end = endOf(sql, quote, end + 1)
  return end
}

function endOfEscapeString(sql, from) {
  for (let at = from; at < sql.length; at++) {
    if (sql[at] === '\\') at++
    else if (sql[at] === "'") {
      if (sql[at + 1] !== "'") return at + 1
      at++
    }
  }
  return sql.length
}

function endOfBlockComment(sql, from) {
  let depth = 0
  for (let at = from; at < sql.length; at++) {
    if (sql.startsWith('/*', at)) {
      depth++
      at++
    } else if (sql.startsWith('*/', at)) {
      depth--
      at++
      if (depth === 0) return at + 1
    }
  }
  return sql.length
}
