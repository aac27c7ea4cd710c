//! `sheepfs` shows the cluster as files. Its place in the tree is kept here; mounting is not built yet, and saying so
//! with a non-zero exit is all that this program does.

fn main() -> std::process::ExitCode {
    eprintln!("sheepfs: mounting is not available in this version; use `dog vdi read` and `dog vdi write` for now");
    std::process::ExitCode::FAILURE
}
