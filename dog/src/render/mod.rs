//! How data is printed: tables for people, bare values for scripts, JSON for programs. One file per noun.

mod attach;
mod cluster;
mod dump;
mod graph;
mod image;
mod lock_list;
mod log;
mod md;
pub mod node;
mod object;
mod stat;
mod text;
mod track;
mod tree;
mod vdi_list;
