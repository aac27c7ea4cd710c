//! Floor 5: protocols for clients, each blind to the others. They know the data path and sockets, nothing below.

pub mod allowed;
pub mod nbd;
pub mod sheepdog;
