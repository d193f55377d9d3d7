// Makes the cluster that new data folders are copied from: part of the installation.
//
//   node create-cluster.mjs --modules DIR --data DIR
import fs from 'node:fs'
import path from 'node:path'
import { parseArgs } from 'node:util'

import { Engine } from './engine.mjs'

const { values: options } = parseArgs({
  options: { modules: { type: 'string' }, data: { type: 'string' } },
})
const dataDir = path.resolve(options.data)
fs.mkdirSync(dataDir, { mode: 0o700 })
const modulesDir = path.resolve(options.modules)
const engine = new Engine({ modulesDir, dataDir, fsync: false, log: () => {} })
// The first boot on an empty folder creates the cluster.
await engine.boot('template1')
await engine.shutDown()
process.exit(0)
