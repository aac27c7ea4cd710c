//! The command tree: what can be typed, word for word, and the help that belongs to it.
//!
//! Words stay words here: sizes, addresses and snapshot selectors are understood in `meaning.rs`, so that a wrong one
//! gets the exit code and the text that scripts know. Where this tool behaves differently from the old one on purpose,
//! the help of the command says so under "Differs".

use std::ffi::OsString;

use clap::{Args, Parser, Subcommand, ValueHint};

/// The options of `dog` itself have no place before another program's.
const VERBATIM_HELP: &str = "{about-with-newline}\n{usage-heading} {usage}{after-help}";

/// Everything that was typed.
#[derive(Debug, Parser)]
#[command(name = "dog", about = "Manage a sheep cluster", infer_long_args = true, args_override_self = true)]
#[command(disable_version_flag = true, disable_help_subcommand = true)]
pub struct Typed {
    /// Address or name of the sheep to ask, with --key also ADDRESS:PORT; default SHEEPDOG_DOG_ADDR, else 127.0.0.1
    #[arg(short, long, global = true, value_name = "ADDRESS", allow_hyphen_values = true)]
    pub address: Option<String>,
    /// Port of the sheep to ask; default SHEEPDOG_DOG_PORT, else 7000
    #[arg(short, long, global = true, value_name = "PORT", allow_hyphen_values = true)]
    pub port: Option<String>,
    /// Connect to the port for other nodes, encrypted, with this copy of the cluster key; default DOG_KEY
    #[arg(id = "key_file", long = "key", global = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub key_file: Option<OsString>,
    /// Print at the end how long it took
    #[arg(short = 'T', long, global = true)]
    pub time: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The first word.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Volumes, their snapshots and clones
    #[command(subcommand, disable_help_subcommand = true)]
    Vdi(Vdi),
    /// The machines of the cluster
    #[command(subcommand, disable_help_subcommand = true)]
    Node(Node),
    /// The cluster as a whole
    #[command(subcommand, disable_help_subcommand = true)]
    Cluster(Cluster),
    /// QEMU's image tool, for sheepdog: volumes too
    #[command(disable_help_flag = true, help_template = VERBATIM_HELP, override_usage = "dog img ARGS...")]
    #[command(after_help = "Runs qemu-img with ARGS, every sheepdog: volume replaced by its NBD export, so that\n\
        it works with a QEMU that has no sheepdog driver. All words after 'img' are those of\n\
        qemu-img, --help and -a too.\n\n\
        Examples:\n  dog img create sheepdog:disk1 20G\n  dog img convert -O raw system.qcow2 sheepdog:disk1\n  \
        dog img convert -O qcow2 sheepdog:disk1:before-upgrade backup.qcow2\n  \
        dog img snapshot -c before-upgrade sheepdog:disk1\n  \
        dog img create -b sheepdog:disk1:before-upgrade sheepdog:disk2\n  dog img resize sheepdog:disk1 +10G\n  \
        dog img info --output=json sheepdog://10.0.0.1:7000/disk1\n\n\
        Volumes:\n  sheepdog:NAME[:TAG]              sheepdog:HOST:PORT:NAME[:TAG]\n  \
        sheepdog://HOST:PORT/NAME[#TAG]  sheepdog+unix:///NAME?socket=DIR/sock[#TAG]\n  \
        also in option strings, --image-opts and json:. Without a host the sheep that\n  \
        SHEEPDOG_DOG_ADDR and SHEEPDOG_DOG_PORT name is asked, else the one on this machine.\n\n\
        create, info, resize and snapshot of a volume are done by dog itself;\nconvert without -n creates the volume first.\n\
        Options of a new volume (-o): redundancy=COPIES, object_size=SIZE, preallocation=off|full.\n\
        DOG_QEMU_IMG names another program than qemu-img.")]
    Img(Verbatim),
    /// QEMU's tool for single reads and writes, for sheepdog: volumes too
    #[command(disable_help_flag = true, help_template = VERBATIM_HELP, override_usage = "dog io ARGS...")]
    #[command(
        after_help = "Runs qemu-io with ARGS, every sheepdog: volume replaced by its NBD export; see 'dog help img'.\n\n\
        Examples:\n  dog io -f raw -c 'read -v 0 512' sheepdog:disk1\n  dog io -f raw -c 'write -P 0xab 0 4k' sheepdog:disk1\n\n\
        DOG_QEMU_IO names another program than qemu-io."
    )]
    Io(Verbatim),
    /// QEMU's NBD server, for sheepdog: volumes too
    #[command(disable_help_flag = true, help_template = VERBATIM_HELP, override_usage = "dog nbd ARGS...")]
    #[command(
        after_help = "Runs qemu-nbd with ARGS, every sheepdog: volume replaced by its NBD export; see 'dog help img'.\n\n\
        Examples:\n  dog nbd -f raw -c /dev/nbd0 sheepdog:disk1\n  dog nbd -d /dev/nbd0\n  \
        dog nbd -f raw -r -k /run/disk1.sock sheepdog:disk1:before-upgrade\n\n\
        The sheep serve NBD themselves: 'dog vdi attach' shows how to use that.\n\
        DOG_QEMU_NBD names another program than qemu-nbd."
    )]
    Nbd(Verbatim),
    /// Print what teaches a shell the words of this tool
    #[command(after_help = "Examples:\n  dog completions bash > /etc/bash_completion.d/dog\n  \
        dog completions zsh > /usr/local/share/zsh/site-functions/_dog\n  \
        dog completions fish > ~/.config/fish/completions/dog.fish")]
    Completions(Completions),
    /// Write the manual pages
    #[command(after_help = "Example:\n  dog man /usr/local/share/man/man1\n\n\
        One page for each command: dog.1, dog-vdi.1, dog-vdi-create.1 and so on.")]
    Man(Man),
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Completions {
    /// bash, zsh or fish
    #[arg(value_name = "bash|zsh|fish")]
    pub shell: String,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Man {
    /// Where to write them; made if it does not exist
    #[arg(value_hint = ValueHint::DirPath)]
    pub directory: OsString,
}

/// Words that are another program's.
#[derive(Debug, Args)]
pub struct Verbatim {
    /// What the program is given
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    pub words: Vec<OsString>,
}

/// The second word after `vdi`.
#[derive(Debug, Subcommand)]
#[allow(missing_docs)] // the texts below are the help that users read
pub enum Vdi {
    /// Compare all copies of a VDI's objects and repair what differs
    #[command(after_help = "Examples:\n  dog vdi check disk1\n  dog vdi check -s before-upgrade disk1\n\n\
        Differs from the old tool: exits 1 when something could not be repaired, or is lost.")]
    Check(Check),
    /// Create a VDI
    #[command(after_help = "Examples:\n  dog vdi create disk1 20G\n  dog vdi create -c 2 -z 23 -v disk1 1.5T\n  \
        dog vdi create -P disk1 512M\n\nA size is a number and at most one letter of b k m g t p.\n\
        Differs from the old tool: an empty or overlong name is refused, not created or cut.")]
    Create(Create),
    /// Turn the present content of a VDI into a snapshot
    #[command(after_help = "Examples:\n  dog vdi snapshot -s before-upgrade disk1\n  dog vdi snapshot -rv disk1\n\n\
        The old VDI id becomes the snapshot; the volume goes on under a new id.")]
    Snapshot(Snapshot),
    /// Create a VDI whose content is that of a snapshot
    #[command(after_help = "Examples:\n  dog vdi clone -s before-upgrade disk1 disk2\n  \
        dog vdi clone -n -s before-upgrade disk1 disk2\n\n\
        The clone has the object size of the snapshot and shares its objects until they are written.\n\
        With -P it gets all of its objects now, with -n those that the snapshot has, and no parent then.")]
    Clone(Clone),
    /// Delete a VDI or a snapshot
    #[command(after_help = "Examples:\n  dog vdi delete disk1\n  dog vdi delete -s before-upgrade disk1\n  \
        dog vdi delete -m 1000 disk1\n\n\
        With -m the first N objects that the VDI has become holes, and it stays; a snapshot is deleted as\n\
        a whole.\n\
        Differs from the old tool: exits 1 when nothing was deleted; the old one exited 0.\n\
        -B and -I are accepted and mean nothing: the cluster drops the objects by itself, at its own pace.")]
    Delete(Delete),
    /// Go back to a snapshot, discarding what was written since
    #[command(after_help = "Examples:\n  dog vdi rollback -s before-upgrade disk1\n  \
        dog vdi rollback -f -s 3 disk1\n\nShut down what uses the volume first.")]
    Rollback(Rollback),
    /// List VDIs, or one and its snapshots
    #[command(after_help = "Examples:\n  dog vdi list\n  dog vdi list -r disk1\n  dog vdi list --json\n\n\
        Flags: s snapshot, c clone. Order: by VDI id.\n\
        Differs from the old tool: exits 1 when the header of a VDI could not be read.")]
    List(List),
    /// Show which snapshot grew from which
    #[command(after_help = "Examples:\n  dog vdi tree\n  dog vdi tree --json")]
    Tree(Tree),
    /// Show which snapshot grew from which, for Graphviz
    #[command(after_help = "Example:\n  dog vdi graph | dot -Tsvg > vdis.svg\n\n\
        Working VDIs are red. A box with nothing but an id stands for a VDI that was deleted.\n\
        Differs from the old tool: Tag is the tag of a snapshot, its number only where it has none, and\n\
        no edge leads to a VDI that has no parent.")]
    Graph,
    /// Show where the objects of a VDI are, or which it has
    #[command(after_help = "Examples:\n  dog vdi object map disk1\n  dog vdi object location disk1\n  \
        dog vdi object location -i 12 disk1\n\nEach node is asked what it has; where the object should be comes last, \
        the preferred node first.\n\n\
        Differs from the old tool: dump-inode takes the name of a VDI and asks the cluster; the old one\n\
        took a file of a store, and printed counts of references (gref), which do not exist here.")]
    Object(Object),
    /// Show where an object of a VDI was in each epoch
    #[command(after_help = "Examples:\n  dog vdi track disk1\n  dog vdi track -i 12 disk1\n  \
        dog vdi track -o 7c2b250000000c --json\n\n\
        Newest epoch first: the nodes that should have held the object then, the preferred one first.\n\
        Without -i and -o it is the inode.\n\
        Differs from the old tool: an epoch with fewer nodes than copies is not printed again for every older one.")]
    Track(Track),
    /// Set or delete an attribute of a VDI
    #[command(
        after_help = "Examples:\n  dog vdi setattr disk1 owner alice\n  dog vdi setattr disk1 notes < notes.txt\n  \
        dog vdi setattr -d disk1 owner\n\nDiffers from the old tool: a key or value that is too long is refused, not cut."
    )]
    Setattr(Setattr),
    /// Print an attribute of a VDI
    #[command(
        after_help = "Example:\n  dog vdi getattr disk1 owner\n\nThe value is printed as it is, without a newline.\n\
        Differs from the old tool: exits 5 only when the attribute or the VDI is missing."
    )]
    Getattr(Getattr),
    /// Make a VDI larger or smaller
    #[command(after_help = "Examples:\n  dog vdi resize disk1 40G\n  dog vdi resize -f disk1 10G\n\n\
        Both while it is in use, if its users bear it: make the file system smaller first, the VDI then.\n\
        What is beyond the new end is gone, also from disk; when the VDI grows again it reads zeros there.\n\
        An NBD client learns of a new size when it connects again; writes beyond the end are refused.\n\
        An interruption leaves the old size, and perhaps zeros beyond the new one; run the command again.\n\n\
        Differs from the old tool: that could not make a VDI smaller and exited 64.")]
    Resize(Resize),
    /// Write the content of a VDI to standard output
    #[command(
        after_help = "Examples:\n  dog vdi read disk1 > disk1.raw\n  dog vdi read -s before-upgrade disk1 1M 512"
    )]
    Read(Read),
    /// Write standard input to a VDI
    #[command(after_help = "Examples:\n  dog vdi write disk1 < disk1.raw\n  echo hello | dog vdi write disk1 4k\n  \
        dog vdi write disk1 0 512 < sector\n\nDiffers from the old tool:\n  \
        Without a length exactly the bytes of standard input are written; the rest of the last object stays.\n  \
        With a length exactly that many bytes are written, missing ones as zeros.\n  \
        Zeros written where the volume has a hole take no space.\n  \
        Input that continues beyond the end of the VDI is an error (exit 1), not dropped in silence.")]
    Write(Write),
    /// Show who has VDIs open, or open the way for another
    #[command(
        after_help = "Examples:\n  dog vdi lock list\n  dog vdi lock list --json\n  dog vdi lock unlock disk1\n\n\
        Locks exist in a cluster that was formatted with 'dog cluster format -l', for clients of the\n\
        native protocol; elsewhere the list is empty. A lock is shown with the node that its client is\n\
        connected to, and ends when that client closes the VDI, 5 s after it is gone, or when the node\n\
        is gone. unlock does not disconnect the client: make sure that it does not write any more.\n\
        Differs from the old tool: no lock stays behind when a client or a node crashes, or with a\n\
        snapshot."
    )]
    Lock(Lock),
    /// Write what changed between two snapshots of a VDI to standard output
    #[command(after_help = "Examples:\n  dog vdi backup -F monday -s tuesday disk1 > disk1.tuesday\n  \
        dog vdi backup -F 3 -s 4 disk1 | ssh store 'cat > disk1.4'\n\n\
        'dog vdi restore' reads it. What did not change is not read; of an object that changed, the part\n\
        from the first to the last change is written. A saved machine state is not in it.\n\
        'dog vdi read -s monday disk1' writes everything, for the first backup.\n\
        Differs from the old tool: the stream has checksums and says what it belongs to; the old tool\n\
        cannot read it, and this one cannot read those of the old tool.")]
    Backup(Backup),
    /// Make a snapshot from an older one and the changes that backup wrote
    #[command(after_help = "Examples:\n  dog vdi restore -s monday disk1 < disk1.tuesday\n  \
        ssh store 'cat disk1.4' | dog vdi restore -s 3 disk1\n\n\
        -s names the snapshot that the changes begin at: the same one, or one of a clone that shares all\n\
        of its objects. The result is a further snapshot, without a tag, whose number is printed;\n\
        'dog vdi rollback' goes back to it, 'dog vdi clone' makes a volume of it.\n\
        A stream that is damaged, cut off, or belongs to something else is refused, and then, as after\n\
        an interruption, there is no further snapshot.\n\
        To restore into another cluster, or on top of a restored snapshot, give -f: then the parts of\n\
        objects that the stream replaces are compared with what it expects there; that the rest is the\n\
        same too is your word.\n\n\
        Differs from the old tool: the volume itself, its content and what it was made from stay as they\n\
        are, and may be in use; the old tool deleted it and made it anew, and a bad stream destroyed it.\n\
        -B and -I are accepted and mean nothing.")]
    Restore(Restore),
    /// Show how to use a VDI on this machine
    #[command(after_help = "Examples:\n  dog vdi attach disk1\n  dog vdi attach -s before-upgrade disk1 --json\n  \
        dog vdi attach disk1 --nbd /dev/nbd0\n\n\
        Prints what to give QEMU, libvirt and nbd-client. Snapshots are read-only.\n\
        --nbd needs root, nbd-client and the kernel's module nbd; 'nbd-client -d /dev/nbd0' detaches.\n\
        DOG_NBD_CLIENT names another program than nbd-client.")]
    Attach(Attach),
    /// Change the number of copies of a VDI's objects
    #[command(after_help = "Examples:\n  dog vdi alter-copy -c 3 disk1\n  dog vdi alter-copy -f -c 1 scratch\n\n\
        The VDI may be in use. Its snapshots have the same number of copies and change with it.\n\
        The cluster brings the further copies, or drops those that are too many, in the background;\n\
        'dog node recovery' shows it. Clones, and what they share with a VDI of another name, keep\n\
        their own numbers.\n\n\
        Differs from the old tool: VDIs with snapshots, and clones, can be altered too.")]
    AlterCopy(AlterCopy),
    /// Give a VDI and its snapshots another name
    #[command(after_help = "Example:\n  dog vdi rename disk1 web-disk\n\n\
        Whoever has it open goes on. QEMU's old sheepdog driver does not list the snapshots that were made\n\
        before, because it looks for them by the name.")]
    Rename(Rename),
    /// Make a clone independent of what it was cloned from
    #[command(after_help = "Example:\n  dog vdi flatten disk2\n\n\
        The VDI gets its own copy of every object that it shares, while it is in use; then it has no parent\n\
        any more. An interruption does no harm: the same command goes on where it was. Snapshots of the VDI\n\
        itself keep sharing. Close and open it in QEMU's old sheepdog driver before its former parent is\n\
        deleted: that driver keeps a list of objects of its own.")]
    Flatten(Flatten),
    /// Limit how fast a VDI may be used
    #[command(after_help = "Examples:\n  dog vdi qos disk1 --iops 500 --bps 50M --burst 10\n  dog vdi qos disk1\n  \
        dog vdi qos disk1 --iops 0 --bps 0\n\n\
        Takes effect at once, for clients that are connected too. 0 is no limit; without options the limits\n\
        are shown. After a pause, --burst seconds' worth may be used at once. The limits hold at the node\n\
        that a client is connected to, for all of its clients together.")]
    Qos(Qos),
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct AlterCopy {
    /// Copies of each object, 1 to 31 [default: 3]
    #[arg(short, long, value_name = "COPIES", allow_hyphen_values = true)]
    pub copies: Option<String>,
    /// Do not ask
    #[arg(short, long)]
    pub force: bool,
    /// Name of the VDI
    pub vdi: OsString,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Rename {
    /// Name of the VDI
    pub vdi: OsString,
    /// The new name
    pub to: OsString,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Flatten {
    /// Name of the VDI
    pub vdi: OsString,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Qos {
    /// Reads, writes and discards per second
    #[arg(long, value_name = "N")]
    pub iops: Option<u64>,
    /// Bytes per second, such as 50M
    #[arg(long, value_name = "BYTES")]
    pub bps: Option<String>,
    /// Seconds' worth that may be used at once after a pause
    #[arg(long, value_name = "SECONDS")]
    pub burst: Option<u32>,
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// Name of the VDI
    pub vdi: OsString,
}

/// `-s`, for commands that work on snapshots too.
#[derive(Debug, Args)]
pub struct SnapshotWord {
    /// Tag or id of a snapshot; all digits are an id
    #[arg(id = "snapshot", short = 's', long = "snapshot", value_name = "TAG|ID", allow_hyphen_values = true)]
    pub word: Option<OsString>,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Attach {
    #[command(flatten)]
    pub snapshot: SnapshotWord,
    /// Make the VDI this block device, with nbd-client
    #[arg(long, value_name = "DEVICE")]
    pub nbd: Option<OsString>,
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// Name of the VDI
    pub vdi: OsString,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Check {
    #[command(flatten)]
    pub snapshot: SnapshotWord,
    /// Only report missing objects, and repair nothing
    #[arg(short, long)]
    pub exist: bool,
    /// Name of the VDI
    pub vdi: OsString,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Create {
    /// Allocate every object now
    #[arg(short = 'P', long)]
    pub prealloc: bool,
    /// A volume of more than 2^20 objects (not available in this version)
    #[arg(short = 'y', long)]
    pub hyper: bool,
    /// Copies of each object, 1 to 31 [default: the cluster's]
    #[arg(short, long, value_name = "COPIES", allow_hyphen_values = true)]
    pub copies: Option<String>,
    /// Object size as a power of two, 20 to 31 [default: the cluster's]
    #[arg(short = 'z', long = "block_size_shift", value_name = "SHIFT", allow_hyphen_values = true)]
    pub block_size_shift: Option<String>,
    /// With -v, print the bare id
    #[arg(short, long)]
    pub raw: bool,
    /// Print the id of the new VDI
    #[arg(short, long)]
    pub verbose: bool,
    /// Name of the new VDI
    pub vdi: OsString,
    /// Size, such as 20G
    pub size: Option<String>,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Snapshot {
    /// Tag of the new snapshot; not a number
    #[arg(short = 's', long = "snapshot", value_name = "TAG", allow_hyphen_values = true)]
    pub tag: Option<OsString>,
    /// Do nothing if nothing was written since the last snapshot
    #[arg(short = 'R', long)]
    pub reduce_identical_snapshots: bool,
    /// With -v, print the bare ids
    #[arg(short, long)]
    pub raw: bool,
    /// Print the ids of volume and snapshot
    #[arg(short, long)]
    pub verbose: bool,
    /// Name of the VDI; of several, the snapshots are of one moment
    #[arg(required = true, value_name = "VDI")]
    pub vdi: Vec<OsString>,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Clone {
    #[command(flatten)]
    pub snapshot: SnapshotWord,
    /// Copy the data and allocate every object now
    #[arg(short = 'P', long)]
    pub prealloc: bool,
    /// Copy the data, so that the new VDI has nothing to do with the snapshot
    #[arg(short, long)]
    pub no_share: bool,
    /// With -v, print the bare id
    #[arg(short, long)]
    pub raw: bool,
    /// Print the id of the new VDI
    #[arg(short, long)]
    pub verbose: bool,
    /// Name of the VDI that has the snapshot
    pub source: OsString,
    /// Name of the new VDI
    pub target: Option<OsString>,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Delete {
    #[command(flatten)]
    pub snapshot: SnapshotWord,
    /// Accepted for old scripts, without effect
    #[arg(short = 'B', long, value_name = "N")]
    pub nr_batched_reclamation: Option<String>,
    /// Accepted for old scripts, without effect
    #[arg(short = 'I', long, value_name = "SECONDS")]
    pub reclamation_interval: Option<String>,
    /// Drop at most N objects and keep the VDI
    #[arg(short, long, value_name = "N")]
    pub max_reclaim: Option<String>,
    /// Name of the VDI
    pub vdi: OsString,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Rollback {
    #[command(flatten)]
    pub snapshot: SnapshotWord,
    /// Do not ask
    #[arg(short, long)]
    pub force: bool,
    /// Accepted for old scripts, without effect
    #[arg(short = 'B', long, value_name = "N")]
    pub nr_batched_reclamation: Option<String>,
    /// Accepted for old scripts, without effect
    #[arg(short = 'I', long, value_name = "SECONDS")]
    pub reclamation_interval: Option<String>,
    /// With -v, print the bare id
    #[arg(short, long)]
    pub raw: bool,
    /// Print the new id of the VDI
    #[arg(short, long)]
    pub verbose: bool,
    /// Name of the VDI
    pub vdi: OsString,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct List {
    /// Only VDIs that use the data object with this id (hexadecimal)
    #[arg(short, long, value_name = "OID")]
    pub oid: Option<String>,
    /// Bare values, separated by blanks
    #[arg(short, long, conflicts_with = "json")]
    pub raw: bool,
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// Only the VDI of this name and its snapshots
    pub vdi: Option<OsString>,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Tree {
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Object {
    /// Index of a data object, decimal or 0x...
    #[arg(short, long, value_name = "INDEX", allow_hyphen_values = true)]
    pub index: Option<String>,
    #[command(flatten)]
    pub snapshot: SnapshotWord,
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// location: which nodes have an object; map: which VDI owns each object; dump-inode: everything an inode says
    #[arg(value_name = "location|map|dump-inode")]
    pub nested: Option<String>,
    /// Name of the VDI
    pub vdi: Option<OsString>,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Track {
    /// Index of a data object, decimal or 0x...
    #[arg(short, long, value_name = "INDEX", allow_hyphen_values = true, conflicts_with = "oid")]
    pub index: Option<String>,
    #[command(flatten)]
    pub snapshot: SnapshotWord,
    /// Id of the object (hexadecimal), instead of the name of its VDI
    #[arg(short, long, value_name = "OID")]
    pub oid: Option<String>,
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// Name of the VDI
    #[arg(required_unless_present = "oid")]
    pub vdi: Option<OsString>,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Setattr {
    /// Delete the attribute
    #[arg(short, long)]
    pub delete: bool,
    /// Fail if the attribute exists
    #[arg(short = 'x', long)]
    pub exclusive: bool,
    /// Name of the VDI
    pub vdi: OsString,
    /// Name of the attribute
    pub key: Option<OsString>,
    /// Its value; standard input when left out
    pub value: Option<OsString>,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Getattr {
    /// Name of the VDI
    pub vdi: OsString,
    /// Name of the attribute
    pub key: Option<OsString>,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Resize {
    /// Make it smaller without asking, even if a client has locked it
    #[arg(short, long)]
    pub force: bool,
    /// Name of the VDI
    pub vdi: OsString,
    /// New size, such as 40G
    pub size: Option<String>,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Read {
    #[command(flatten)]
    pub snapshot: SnapshotWord,
    /// Name of the VDI
    pub vdi: OsString,
    /// Where to begin [default: 0]
    pub offset: Option<String>,
    /// How much [default: to the end]
    pub length: Option<String>,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Write {
    /// Accepted for old scripts, without effect
    #[arg(short, long)]
    pub writeback: bool,
    /// Name of the VDI
    pub vdi: OsString,
    /// Where to begin [default: 0]
    pub offset: Option<String>,
    /// How much [default: what standard input has]
    pub length: Option<String>,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Lock {
    #[command(flatten)]
    pub snapshot: SnapshotWord,
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// list: who has what open; unlock: let another client open it
    #[arg(value_name = "list|unlock")]
    pub nested: Option<String>,
    /// Name of the VDI to unlock
    pub vdi: Option<OsString>,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Backup {
    /// Tag or id of the earlier snapshot; all digits are an id
    #[arg(short = 'F', long, value_name = "TAG|ID", allow_hyphen_values = true)]
    pub from: Option<OsString>,
    #[command(flatten)]
    pub snapshot: SnapshotWord,
    /// Name of the VDI
    pub vdi: OsString,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Restore {
    #[command(flatten)]
    pub snapshot: SnapshotWord,
    /// Take the snapshot for the one that the changes begin at
    #[arg(short, long)]
    pub force: bool,
    /// Accepted for old scripts, without effect
    #[arg(short = 'B', long, value_name = "N")]
    pub nr_batched_reclamation: Option<String>,
    /// Accepted for old scripts, without effect
    #[arg(short = 'I', long, value_name = "SECONDS")]
    pub reclamation_interval: Option<String>,
    /// Name of the VDI
    pub vdi: OsString,
}

/// The second word after `node`.
#[derive(Debug, Subcommand)]
#[allow(missing_docs)]
pub enum Node {
    /// Stop a node
    #[command(
        after_help = "Example:\n  dog node kill 2\n\nIds are those of `dog node list`; they change when nodes come and go."
    )]
    Kill(Kill),
    /// List the nodes
    #[command(after_help = "Examples:\n  dog node list\n  dog node list -r\n  dog node list --json\n\n\
        Nodes that ask to come in follow in a table of their own; -r leaves them out.")]
    List(Shape),
    /// Show the space of each node
    #[command(after_help = "Examples:\n  dog node info\n  dog node info --json\n\n\
        Differs from the old tool: keeps the id of a node when another does not answer, and then exits 2.")]
    Info(Shape),
    /// Show which nodes are still receiving copies
    #[command(
        after_help = "Examples:\n  dog node recovery\n  until [ $(dog node recovery -r | wc -l) = 0 ]; do sleep 1; done\n\n\
        Two header lines and nothing else: no node is recovering.\n\
        set-throttle MAX INTERVAL: the node that is asked brings at most MAX objects in INTERVAL\n\
        milliseconds, until it is started again; 0 0 lifts it. Objects that somebody reads or writes do\n\
        not wait.\n\n\
        Examples:\n  dog node recovery set-throttle 10 1000\n  dog node recovery get-throttle"
    )]
    Recovery(Recovery),
    /// Show what a node was asked by clients and by other nodes
    #[command(
        after_help = "Examples:\n  dog node stat\n  dog node stat -w\n  dog -a 10.0.0.2 --key key node stat --json\n\n\
        Counts I/O since the sheep was started, NBD included. All WR and All RD are the bytes\n\
        to be written and read; WRBW, RDBW and RPS are bytes and requests per second.\n\
        With --json and -w, each line is one value.\n\n\
        Differs from the old tool: Write and Read are not swapped without -w."
    )]
    Stat(Stat),
    /// Show or change how much a node logs
    #[command(
        after_help = "Examples:\n  dog node log level get\n  dog node log level set debug\n  dog node log level list\n\n\
        Until the sheep is started again; 'sheep -l level=' sets the level it begins with.\n\
        The log has errors (err and below), warnings (warning), what people should know (notice, info), and\n\
        everything (debug).\n\n\
        Differs from the old tool: prints on standard output; an unknown level exits 64."
    )]
    Log(Log),
    /// Let a node in that asks
    #[command(after_help = "Examples:\n  dog node list\n  dog node admit 3f9c2a70b1d4e865\n  dog node admit 3f9c\n\n\
        Before you let it in, compare the fingerprint with the one that 'dog node list' shows on\n\
        its own machine. The beginning of the id is enough if no other node's begins so.")]
    Admit(Admit),
    /// Shut a node out for good
    #[command(after_help = "Examples:\n  dog node ban 3f9c2a70b1d4e865\n  dog node ban -f 3f9c\n\n\
        'dog cluster info -v' shows the ids. The cluster key is replaced too: the node knew it.\n\
        A node that is only to stop, or to be repaired, needs no ban: dog node kill.")]
    Ban(Ban),
    /// Show the disks of a node
    #[command(after_help = "Examples:\n  dog node md info\n  dog node md info -A\n\n\
        Differs from the old tool: disks are given when sheep is started for the first time\n\
        (sheep META,DISK1,DISK2); plug and unplug are refused. To change them, start the node with an\n\
        empty META, and the others fill it.")]
    Md(Md),
    /// The share of the data that a node has
    #[command(
        after_help = "Shares follow the capacities of the nodes; 'dog cluster reweight' looks at them again.\n\n\
        Differs from the old tool: there are no fixed numbers of vnodes, so set always refuses\n\
        (exit 255), as the old one did where numbers were automatic."
    )]
    Vnodes(Vnodes),
    /// Look whether a directory can become a node's store
    #[command(after_help = "Example:\n  dog node format /data plain\n\n\
        For old scripts: sheep makes its store by itself when it is started with an empty directory.\n\
        Nothing is written. A directory that has a store, or anything else, is refused (exit 2).")]
    Format(NodeFormat),
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Md {
    /// Of all nodes
    #[arg(short = 'A', long)]
    pub all: bool,
    /// Accepted for old scripts, without effect
    #[arg(short, long)]
    pub force: bool,
    #[command(flatten)]
    pub shape: Shape,
    /// info: show them; plug, unplug: refused
    #[arg(value_name = "info|plug|unplug")]
    pub nested: Option<String>,
    /// Directories to plug or unplug
    #[arg(value_name = "DIR,...")]
    pub disks: Option<OsString>,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Vnodes {
    /// set, which is refused
    #[arg(value_name = "set")]
    pub nested: Option<String>,
    /// A number from 1 to 65535
    #[arg(value_name = "N", allow_hyphen_values = true)]
    pub count: Option<String>,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct NodeFormat {
    /// The directory
    #[arg(value_hint = ValueHint::DirPath)]
    pub directory: Option<OsString>,
    /// plain or tree; both mean the same
    #[arg(value_name = "plain|tree")]
    pub store: Option<String>,
}

/// How to print.
#[derive(Debug, Args)]
pub struct Shape {
    /// Bare values, separated by blanks
    #[arg(short, long, conflicts_with = "json")]
    pub raw: bool,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Kill {
    /// Accepted for old scripts, without effect
    #[arg(short, long)]
    pub raw: bool,
    /// Stop the node that is asked (-a, -p)
    #[arg(short, long)]
    pub local: bool,
    /// Id of the node: its position in the list, or its 16 hexadecimal digits
    pub id: Option<String>,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Admit {
    /// Id of the node, or the beginning of it, in hexadecimal digits
    pub id: String,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Ban {
    /// Do not ask
    #[arg(short, long)]
    pub force: bool,
    /// Id of the node, or the beginning of it, in hexadecimal digits
    pub id: String,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Stat {
    #[command(flatten)]
    pub shape: Shape,
    /// Print again every second, with rates
    #[arg(short, long)]
    pub watch: bool,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Log {
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// level
    #[arg(value_name = "level")]
    pub nested: Option<String>,
    /// get: show it; set: change it; list: show which there are
    #[arg(value_name = "get|set|list")]
    pub what: Option<String>,
    /// One of emerg, alert, crit, err, warning, notice, info, debug
    #[arg(value_name = "LEVEL")]
    pub level: Option<String>,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Recovery {
    #[command(flatten)]
    pub shape: Shape,
    /// Draw how far the node that is asked has come, until it has finished
    #[arg(short = 'P', long)]
    pub progress: bool,
    /// info, which is also the default; get-throttle, set-throttle: how fast the node that is asked may go
    #[arg(value_name = "info|get-throttle|set-throttle")]
    pub nested: Option<String>,
    /// Objects in each interval; 0 for as many as can be
    #[arg(value_name = "MAX", allow_hyphen_values = true)]
    pub max: Option<String>,
    /// Milliseconds; 0 for as many as can be
    #[arg(value_name = "INTERVAL", allow_hyphen_values = true)]
    pub interval: Option<String>,
}

/// The second word after `cluster`.
#[derive(Debug, Subcommand)]
#[allow(missing_docs)]
pub enum Cluster {
    /// Show the state of the cluster and the history of its members
    #[command(after_help = "Examples:\n  dog cluster info\n  dog cluster info -v\n  dog cluster info --json\n\n\
        What the cluster waits for, if anything, follows the status; who does not answer and what\n\
        to do about it comes last. -v also shows ids, voters, and the round trips to the other nodes.")]
    Info(Info),
    /// Make the cluster ready for use, discarding everything in it
    #[command(after_help = "Examples:\n  dog cluster format\n  dog cluster format -c 2 -z 23\n\n\
        The nodes that are acquainted with the one that is asked become the cluster; they are shown,\n\
        with the fingerprints by which they know each other from then on. Others ask to come in later.\n\
        Differs from the old tool: -f also skips the question about more copies than zones.")]
    Format(Format),
    /// Compare all copies of all VDIs' objects and repair what differs
    #[command(after_help = "Example:\n  dog cluster check\n\n\
        An object that several VDIs share is looked at once.\n\
        Differs from the old tool: exits 1 when something could not be repaired, or is lost.")]
    Check,
    /// Stop all nodes
    #[command(after_help = "Example:\n  dog cluster shutdown")]
    Shutdown,
    /// Go on without the nodes that are missing, or hold recovery
    #[command(
        after_help = "Examples:\n  dog cluster recover force\n  dog cluster recover disable\n  dog cluster recover enable\n\n\
        force: only when the missing nodes are lost for good: what only they had is lost with them.\n\
        The id of the cluster has to be typed, unless -f says that a program knows what it does\n\
        (with -c local, a yes is enough).\n\
        disable: copies that are missing or old are left so, but for those that somebody reads or\n\
        writes, until enable: for work on several machines, one after the other."
    )]
    Recover(Recover),
    /// Make a token that lets one new node in
    #[command(after_help = "Example:\n  dog cluster token\n\n\
        Prints the command line to run on the new machine, with its own directory for /data.\n\
        A token is good for one node, once, until the cluster key is replaced. It is a secret.")]
    Token,
    /// Show or replace the cluster key
    #[command(after_help = "Examples:\n  dog cluster key show > key\n  dog cluster key rotate\n\n\
        Every member keeps it in PATH/cluster/key. Whoever has it can join (sheep --key FILE) and\n\
        manage the cluster from another machine (dog -a HOST --key FILE): keep copies as you keep\n\
        passwords. rotate makes copies and unused tokens void; members get the new key by themselves.")]
    Key(Key),
    /// Spread the data by what the nodes' disks hold now
    #[command(after_help = "Example:\n  dog cluster reweight\n\n\
        Every node has the share of the data that the capacity of its disks had of all when it\n\
        started. This looks at the capacities again; where one has changed, objects move, which\n\
        'dog node recovery' shows.")]
    Reweight,
    /// Change the number of copies that new VDIs get
    #[command(after_help = "Example:\n  dog cluster alter-copy -c 2\n\n\
        Existing VDIs keep theirs: dog vdi alter-copy.")]
    AlterCopy(ClusterAlterCopy),
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct ClusterAlterCopy {
    /// Copies of each object, 1 to 31 [default: 3]
    #[arg(short, long, value_name = "COPIES", allow_hyphen_values = true)]
    pub copies: Option<String>,
    /// Do not ask
    #[arg(short, long)]
    pub force: bool,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Info {
    #[command(flatten)]
    pub shape: Shape,
    /// Show who joined and left with each epoch
    #[arg(short, long)]
    pub diff: bool,
    /// Show redundancy and strategies too, and how the nodes agree
    #[arg(short, long)]
    pub verbose: bool,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Format {
    /// Kind of store
    #[arg(short = 'b', long, value_name = "STORE", default_value = "plain")]
    pub store: String,
    /// Copies of each object, 1 to 31 [default: 3]
    #[arg(short, long, value_name = "COPIES", allow_hyphen_values = true)]
    pub copies: Option<String>,
    /// Let only one client of the native protocol open a volume (live migration needs two)
    #[arg(short, long)]
    pub lock: bool,
    /// Refuse writes that cannot have all their copies
    #[arg(short = 't', long)]
    pub strict: bool,
    /// Object size as a power of two, 20 to 31 [default: 22]
    #[arg(short = 'z', long = "block_size_shift", value_name = "SHIFT", allow_hyphen_values = true)]
    pub block_size_shift: Option<String>,
    /// Accepted for old scripts, without effect: shares follow the capacities of the nodes
    #[arg(short = 'V', long)]
    pub fixedvnodes: bool,
    /// Accepted for old scripts, without effect: ids are not given out again
    #[arg(short = 'R', long)]
    pub recyclevid: bool,
    /// Do not ask
    #[arg(short, long)]
    pub force: bool,
    /// Let any node of the network in, and encrypt nothing between nodes: for laboratories
    #[arg(long)]
    pub open: bool,
    /// Accepted for old scripts, without effect: disks always keep a reserve
    #[arg(short = 'F', long = "avoid-diskfull")]
    pub avoid_diskfull: bool,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Recover {
    /// Do not ask
    #[arg(short, long)]
    pub force: bool,
    /// force: go on without the missing nodes; disable, enable: hold recovery, let it run
    #[arg(value_name = "force|enable|disable")]
    pub nested: Option<String>,
}

#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Key {
    /// show: print it; rotate: replace it
    #[arg(value_name = "show|rotate")]
    pub nested: Option<String>,
}
