// Who may connect, and to what: a copy of the cluster-wide catalogs, so that a connection can be
// answered while another session holds the engine. It is read again after whatever may change it.
import { SUPERUSER_STATE, applyState, readReported } from './settings.mjs'

const CATALOG_SQL = `
  SELECT 'role', rolname, oid::text, rolcanlogin::text, rolsuper::text FROM pg_catalog.pg_roles;
  SELECT 'database', datname, oid::text, datallowconn::text FROM pg_catalog.pg_database;
  SELECT 'setting', setdatabase::text, setrole::text, unnest(setconfig)
  FROM pg_catalog.pg_db_role_setting ORDER BY setdatabase <> 0, setrole <> 0`

export class Catalog {
  #settings = []
  roles = new Map()
  databases = new Map()
  // What a session with no settings of its own is told.
  defaults = new Map()
  // What sessions that start alike came to, see session.mjs; forgotten with the rest.
  startups = new Map()

  async load(engine) {
    const { rows, error } = await engine.query(CATALOG_SQL)
    if (error) return error
    this.roles.clear()
    this.databases.clear()
    this.startups.clear()
    this.#settings = []
    for (const [kind, ...row] of rows) {
      if (kind === 'role') {
        const [name, oid, login, superuser] = row
        this.roles.set(name, { oid, login: login === 'true', superuser: superuser === 'true' })
      } else if (kind === 'database') {
        const [name, oid, allowed] = row
        this.databases.set(name, { oid, allowed: allowed === 'true' })
      } else {
        const [database, role, assignment] = row
        this.#settings.push({ database, role, assignment })
      }
    }
    return null
  }

  async loadDefaults(engine) {
    await applyState(engine, SUPERUSER_STATE)
    const { reported, error } = await readReported(engine)
    if (error) throw new Error(`the engine does not answer: ${error.M}`)
    this.defaults = reported
  }

  // Returns { sqlstate, text } when the user may not connect to the database, else null.
  refusal(user, database) {
    const role = this.roles.get(user)
    if (role === undefined) return { sqlstate: '28000', text: `role "${user}" does not exist` }
    if (!role.login) {
      return { sqlstate: '28000', text: `role "${user}" is not permitted to log in` }
    }
    const target = this.databases.get(database)
    if (target === undefined) {
      return { sqlstate: '3D000', text: `database "${database}" does not exist` }
    }
    if (!target.allowed) {
      const text = `database "${database}" is not currently accepting connections`
      return { sqlstate: '55000', text }
    }
    return null
  }

  // What ALTER ROLE .. SET and ALTER DATABASE .. SET ask for, the more special ones last.
  administeredSettings(user, database) {
    const values = new Map()
    const roles = ['0', this.roles.get(user)?.oid]
    const databases = ['0', this.databases.get(database)?.oid]
    for (const setting of this.#settings) {
      if (!roles.includes(setting.role) || !databases.includes(setting.database)) continue
      const at = setting.assignment.indexOf('=')
      values.set(setting.assignment.slice(0, at), setting.assignment.slice(at + 1))
    }
    return values
  }
}
