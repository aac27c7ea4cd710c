//! What `dog vdi object dump-inode` shows: all that an inode says.

use super::volume::Volume;

/// See the module.
#[derive(Clone, Debug)]
pub struct Dump(pub Volume);
