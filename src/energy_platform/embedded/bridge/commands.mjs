// The few commands that cannot reach the engine as they are, and what is sent in their place.
//
// A command that is refused is replaced by one that raises the error, so that the transaction is
// aborted, and the rest of a pipeline is skipped, by the engine itself.
import { quoteIdentifier, quoteLiteral } from './wire.mjs'

// findStatement(name) returns the session's prepared statement of that name, or null.
export function editSql(sql, edits, session, findStatement) {
  let edited = sql
  // From the last to the first, so that the positions of those in front stay true.
  for (const edit of edits.toReversed()) {
    const original = sql.slice(edit.start, edit.end)
    const replacement = REPLACEMENTS[edit.kind](original, edit, session, findStatement)
    edited = edited.slice(0, edit.start) + replacement + edited.slice(edit.end)
  }
  return edited
}

const toLatin1 = (text) => Buffer.from(text, 'utf8').toString('latin1')

const REPLACEMENTS = {
  deallocate(original, { name }, session, findStatement) {
    const statement = findStatement(name)
    return statement ? `DEALLOCATE ${quoteIdentifier(statement.engineName)}` : original
  },

  listen() {
    return raise({
      sqlstate: '0A000',
      text: 'LISTEN is not supported by the embedded engine',
      hint: 'Poll instead, or use a TimescaleDB server.',
    })
  },

  // Copying the files takes a quarter of the time of copying block by block through the log.
  createDatabase(original) {
    return `${original} STRATEGY = file_copy`
  },

  dropDatabase(original, { name, force }, session) {
    const others = session.registry.othersIn(name, session)
    if (others.length === 0) return original
    // Who has closed the database to connections has also asked the engine to end those there are,
    // but it knows of none: its pg_stat_activity is empty.
    const isClosed = session.catalog.databases.get(name)?.allowed === false
    if (!force && !isClosed) {
      return raise({
        sqlstate: '55006',
        text: `database "${name}" is being accessed by other users`,
        detail: `There are ${others.length} other sessions using the database.`,
      })
    }
    for (const other of others) {
      other.fatal('57P01', 'terminating connection due to administrator command')
    }
    return original
  },

  // Everything in the engine runs in a superuser's process, so the engine itself would allow it.
  authorization(original, { name }, session) {
    if (name === null) return `SET SESSION AUTHORIZATION ${toLatin1(quoteIdentifier(session.user))}`
    return session.superuser || name === session.user
      ? original
      : raise({ sqlstate: '42501', text: 'permission denied to set session authorization' })
  },

  encoding(original, { name }) {
    return isKnownEncoding(name) ? original : raise(encodingRefusal(name))
  },
}

// The engine traps in a conversion between encodings. SQL_ASCII means that none takes place.
export const isKnownEncoding = (name) => /^(?:utf-?8|unicode|sql_ascii)$/i.test(name)

export function encodingRefusal(name) {
  return {
    sqlstate: '0A000',
    text: `client encoding "${name}" is not supported by the embedded engine`,
    hint: 'Use UTF8.',
  }
}

function raise({ sqlstate, text, detail, hint }) {
  const options = [
    `ERRCODE = ${quoteLiteral(sqlstate)}`,
    `MESSAGE = ${quoteLiteral(text)}`,
    ...(detail ? [`DETAIL = ${quoteLiteral(detail)}`] : []),
    ...(hint ? [`HINT = ${quoteLiteral(hint)}`] : []),
  ]
  const body = `BEGIN RAISE EXCEPTION USING ${options.join(', ')}; END`
  return toLatin1(`DO ${quoteLiteral(body)}`)
}

