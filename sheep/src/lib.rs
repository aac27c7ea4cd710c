//! The daemon, floor by floor.
//!
//! | floor | module | may use |
//! |---|---|---|
//! | 2 | [`world`]: clock, disk, net, rng | `qemu-proto`, `sheep-core` |
//! | 3 | [`store`]: objects on this node's disks | 2 and below |
//! | 3 | [`cluster`]: who is in, in which order things happen | 2 and below; blind to `store` |
//! | 4 | [`data`]: gateway, peer, recovery | 3 and below |
//! | 5 | [`front`]: protocols | `data`, `world::net` and below |
//! | 6 | [`node`], [`config`]: assembly | all |

pub mod cluster;
pub mod config;
pub mod data;
pub mod front;
pub mod logging;
pub mod node;
pub mod store;
pub mod world;
