// The settings of a session, and how they get into the one engine that serves all sessions.
//
// A session's state is SQL that rebuilds it from nothing. That text is also its key: sessions with
// the same text share the engine without any work when it passes from one to the other.
import { quoteIdentifier, quoteLiteral } from './wire.mjs'

const SUPERUSER = 'postgres'

// The engine's own command line sets what no server would; a RESET falls back to it. Its time zone
// is given a name that every client's time zone database knows.
const BOOT_REPAIRS = new Map([
  ['TimeZone', 'UTC'],
  ['allow_system_table_mods', 'off'],
  ['enable_seqscan', 'on'],
  ['log_min_messages', 'fatal'],
  ['search_path', '"$user", public'],
])

// What a server reports to its clients, at the start and whenever it changes. The engine does not.
const REPORTED = [
  'application_name',
  'client_encoding',
  'DateStyle',
  'default_transaction_read_only',
  'in_hot_standby',
  'integer_datetimes',
  'IntervalStyle',
  'is_superuser',
  'scram_iterations',
  'server_encoding',
  'server_version',
  'session_authorization',
  'standard_conforming_strings',
  'TimeZone',
]
// What the bridge itself must obey, for the engine has no timers.
const OBEYED = ['statement_timeout', 'idle_in_transaction_session_timeout']
const DURATION_MS = { '': 1, us: 0.001, ms: 1, s: 1000, min: 60_000, h: 3_600_000, d: 86_400_000 }

// In single-user mode RESET SESSION AUTHORIZATION does nothing, so the superuser is named.
const RESET_SQL =
  `SET SESSION AUTHORIZATION ${SUPERUSER}; RESET ROLE; RESET ALL;` + setConfigSql(BOOT_REPAIRS)

function setConfigSql(values) {
  if (values.size === 0) return ''
  const calls = [...values].map(
    ([name, value]) =>
      `pg_catalog.set_config(${quoteLiteral(name)}, ${quoteLiteral(value)}, false)`,
  )
  return `SELECT ${calls.join(', ')};`
}

function authorizationSql(user) {
  return user === SUPERUSER ? '' : `SET SESSION AUTHORIZATION ${quoteIdentifier(user)};`
}

export class State {
  // values: Map of setting to value; user: the session authorization; role: by SET ROLE, or null.
  constructor({ values, user, role = null }) {
    this.values = values
    this.user = user
    this.role = role
    this.sql =
      RESET_SQL +
      setConfigSql(values) +
      authorizationSql(user) +
      (role === null ? '' : `SET ROLE ${quoteIdentifier(role)};`)
    this.key = this.sql
  }
}

export const SUPERUSER_STATE = new State({ values: new Map(), user: SUPERUSER })

// Settings of the role and database are given by an administrator; those of the connection are set
// with the rights of its user, who may not set all of them.
export function startSql({ user, administered, requested }) {
  return RESET_SQL + setConfigSql(administered) + authorizationSql(user) + setConfigSql(requested)
}

// Reads the state that is in force in the engine. `customNames` are settings with a dot, which
// the engine does not list. Returns { state } or { error }.
export async function captureState(engine, customNames) {
  const names = [...customNames].map(quoteLiteral)
  const custom = names.map(
    (name) => ` UNION ALL SELECT ${name}, pg_catalog.current_setting(${name}, true)`,
  )
  const answer = await engine.query(
    'SELECT name, setting, session_user, current_user FROM (' +
      "SELECT name, setting FROM pg_catalog.pg_settings WHERE source = 'session' AND name NOT IN " +
      "('transaction_isolation', 'transaction_read_only', 'transaction_deferrable')" +
      `${custom.join('')}) AS changed ORDER BY name`,
  )
  if (answer.error) return { error: answer.error }
  const values = new Map()
  for (const [name, value] of answer.rows) if (value !== null) values.set(name, value)
  const [, , sessionUser, currentUser] = answer.rows[0] ?? [null, null, SUPERUSER, SUPERUSER]
  const role = currentUser === sessionUser ? null : currentUser
  return { state: new State({ values, user: sessionUser, role }) }
}

// Makes the state the one in force; returns the error's fields when it cannot be, else null.
export async function applyState(engine, state) {
  if (engine.stateKey === state.key) return null
  engine.stateKey = null
  const { error } = await engine.query(state.sql)
  if (!error) engine.stateKey = state.key
  return error
}

// Reads what clients are told, and what the bridge must obey. Returns { reported, timeouts } or
// { error }.
export async function readReported(engine) {
  const { values, error } = await show(engine, [...REPORTED, ...OBEYED])
  if (error) return { error }
  const reported = new Map(REPORTED.map((name) => [name, values.get(name)]))
  return { reported, timeouts: timeoutsAmong(values) }
}

export async function readTimeouts(engine) {
  const { values, error } = await show(engine, OBEYED)
  return error ? { error } : { timeouts: timeoutsAmong(values) }
}

// SHOW takes no snapshot, so that a transaction may still choose its isolation level afterwards.
async function show(engine, names) {
  const { rows, error } = await engine.query(names.map((name) => `SHOW ${name}`).join(';'))
  return error ? { error } : { values: new Map(names.map((name, index) => [name, rows[index][0]])) }
}

function timeoutsAmong(values) {
  const [statementMs, idleMs] = OBEYED.map((name) => parseDuration(values.get(name) ?? '0'))
  return { statementMs, idleMs }
}

// What a new session would be told, judged by what it asks for, without asking the engine.
export function expectReported(defaults, { user, superuser, administered, requested }) {
  const wanted = new Map()
  for (const [name, value] of [...administered, ...requested]) wanted.set(name.toLowerCase(), value)
  const reported = new Map()
  for (const [name, value] of defaults) reported.set(name, wanted.get(name.toLowerCase()) ?? value)
  reported.set('session_authorization', user)
  reported.set('is_superuser', superuser ? 'on' : 'off')
  return { reported, timeouts: timeoutsAmong(wanted) }
}

// '5s' is 5000; what cannot be read is no limit, and the engine will refuse it when it is set.
function parseDuration(text) {
  const found = /^\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*$/.exec(text)
  const unit = found ? DURATION_MS[found[2]] : undefined
  return unit === undefined ? 0 : Math.round(Number(found[1]) * unit)
}
