//! The harness that the suites share.
//!
//! | module | what it gives |
//! |---|---|
//! | [`spawn`] | real `sheep` processes, killed, restarted, and gone at the end |
//! | [`command`] | other people's programs, with deadlines |
//! | [`clients`] | the native protocol, byte by byte |
//! | [`writer`] | a guest that remembers what it was promised |
//! | [`qemu`] | QEMU's tools, of the release with the sheepdog driver and of this machine |
//! | [`sectors`] | content that tells where it comes from |
//! | [`loop_fs`] | file systems whose power can be cut |
//! | [`tgt`] | an iSCSI target in front of a volume |
//! | [`namespaces`] | a network of hosts, with cables to pull and packets to lose |
//! | [`capture`] | everything that passes its switch |
//! | [`flock`] | real `sheep` processes on such hosts |
//! | [`workload`] | readers and writers through many nodes at once, recorded |
//! | [`volume_model`] | random operations on volumes, and what must come of them |
//! | [`volume_proof`] | such operations on nodes that are killed, and the comparison of everything |
//! | [`linear`] | whether one history explains such a record |
//! | [`sim`] | a whole cluster on one thread: its disks, network, clocks and guests, from one seed |
//! | [`torture`] | real nodes to which everything happens, and guests to whom nothing may |
//! | [`faults`] | what goes wrong in a simulated cluster, and when |
//! | [`oracle`] | what clients were promised: every operation on one volume |
//! | [`promise`] | what a guest was promised that does not wait for the disks |
//! | [`invariants`] | what must hold then, one file each |
//! | [`golden`] | stored outputs |
//! | [`schema`] | stored shapes of JSON |
//! | [`mod@bench`] | loads on volumes and on references beside them, and what they cost |
//! | [`source_scan`] | our own source text, for the tidy suite |

pub mod bench;
pub mod capture;
pub mod clients;
pub mod command;
pub mod faults;
pub mod flock;
pub mod golden;
pub mod guest;
pub mod invariants;
pub mod linear;
pub mod loop_fs;
pub mod namespaces;
pub mod nbd_client;
pub mod oracle;
pub mod promise;
pub mod qemu;
pub mod schema;
pub mod sectors;
pub mod sim;
pub mod source_scan;
pub mod spawn;
pub mod tgt;
pub mod torture;
pub mod volume_model;
pub mod volume_proof;
pub mod workload;
pub mod writer;
