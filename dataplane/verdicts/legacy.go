//go:build linux

package verdicts

import (
	"bytes"
	"errors"
	"fmt"
	"hash/maphash"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// iptables-legacy's tables send no event and have no generation. Their sizes
// are asked for in a microsecond; a table with other rules of the same size is
// told by reading all of it, 3.7 ms for 5,000 rules on the machine where this
// was measured.
const (
	// entriesShare is how much of its time a processor may spend on reading
	// entries: one part in so many.
	entriesShare = 100
	// entriesAtLeast is how often to read them however long it takes.
	entriesAtLeast = time.Second
)

// Options of getsockopt, alike for both families (linux/netfilter_ipv4/ip_tables.h).
const (
	optGetInfo    = 64
	optGetEntries = 65
)

// legacyFamily is one of the two families of iptables-legacy.
type legacyFamily struct {
	name   string
	domain int    // of a socket
	level  int    // of its options
	names  string // the file that lists the tables there are
	entry  entryLayout
}

// entryLayout says where in an entry things lie (struct ipt_entry, ip6t_entry
// on 64-bit machines).
type entryLayout struct {
	proto, flags, invflags int // of the packet's description
	size                   int // of that description
	targetOffset           int
	nextOffset             int
	counters               int
	elems                  int
}

var legacyFamilies = []legacyFamily{{
	name: "ip", domain: unix.AF_INET, level: unix.SOL_IP, names: "ip_tables_names",
	entry: entryLayout{proto: 80, flags: 82, invflags: 83, size: 84, targetOffset: 88, nextOffset: 90, counters: 96, elems: 112},
}, {
	name: "ip6", domain: unix.AF_INET6, level: unix.SOL_IPV6, names: "ip6_tables_names",
	entry: entryLayout{proto: 128, flags: 131, invflags: 132, size: 136, targetOffset: 140, nextOffset: 142, counters: 152, elems: 168},
}}

const sizeofCounters = 16

// sysModules is where the kernel shows what is loaded; a test has its own.
var sysModules = "/sys/module"

// namesFile lists the tables that the calling thread's namespace has. To ask for
// one that it has not would make it.
func (f *legacyFamily) namesFile() procFile {
	return newProcFile("/proc/thread-self/net/" + f.names)
}

// tableNames reads the list. It is empty without ip_tables, or without the older
// interface.
func tableNames(file *procFile) ([]string, error) {
	b, err := file.read(make([]byte, os.Getpagesize()))
	if err != nil {
		return nil, fmt.Errorf("listing tables: %w", err)
	}
	return strings.Fields(string(b)), nil
}

// socket opens a socket whose options tell of tables. Any will do; a raw one
// would need CAP_NET_RAW.
func (f *legacyFamily) socket() (int, error) {
	fd, err := unix.Socket(f.domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("opening a socket: %w", err)
	}
	return fd, nil
}

// tableInfo is struct ipt_getinfo.
type tableInfo struct {
	name       [32]byte
	validHooks uint32
	hookEntry  [5]uint32
	underflow  [5]uint32
	numEntries uint32
	size       uint32
}

// info asks for the size of a table.
func (f *legacyFamily) info(fd int, table string) (tableInfo, error) {
	var info tableInfo
	copy(info.name[:len(info.name)-1], table)
	b := unsafe.Slice((*byte)(unsafe.Pointer(&info)), unsafe.Sizeof(info))
	if err := getsockopt(fd, f.level, optGetInfo, b); err != nil {
		return info, fmt.Errorf("asking for table %s: %w", table, err)
	}
	return info, nil
}

// entriesHeader is the size of struct ipt_get_entries before its entries.
const entriesHeader = 40

// entries reads a table into b, which is returned, perhaps grown, and its
// entries in it.
func (f *legacyFamily) entries(fd int, table string, size uint32, b []byte) (grown, entries []byte, err error) {
	need := entriesHeader + int(size)
	if cap(b) < need {
		b = make([]byte, need)
	}
	b = b[:need]
	clear(b[:entriesHeader])
	copy(b[:31], table)
	native.PutUint32(b[32:], size)
	if err := getsockopt(fd, f.level, optGetEntries, b); err != nil {
		return b, nil, fmt.Errorf("reading table %s: %w", table, err)
	}
	return b, b[entriesHeader:], nil
}

// getsockopt asks for an option whose value is also a question.
func getsockopt(fd, level, option int, b []byte) error {
	size := uint32(len(b))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// clearCounters zeroes what every packet changes.
func (l entryLayout) clearCounters(entries []byte) {
	for len(entries) >= l.elems {
		clear(entries[l.counters : l.counters+sizeofCounters])
		next := int(native.Uint16(entries[l.nextOffset:]))
		if next < l.elems || next > len(entries) {
			return
		}
		entries = entries[next:]
	}
}

// legacyTable is a table as it was last.
type legacyTable struct {
	info tableInfo
	sum  uint64
	read time.Time     // when its entries were
	took time.Duration // to read them
}

// due tells whether it is time to read the entries again.
func (t *legacyTable) due(now time.Time) bool {
	return now.Sub(t.read) >= min(t.took*entriesShare, entriesAtLeast)
}

// legacyTables are the tables of both families.
type legacyTables struct {
	families []legacyTablesOf
	known    map[string]*legacyTable // by family and name
	buf      []byte
	seed     maphash.Seed
	why      []string // what could not be read the last time, and why
}

// legacyTablesOf is where the tables of one family are looked at.
type legacyTablesOf struct {
	legacyFamily
	names procFile
	fd    int // a socket; -1 before there is one
}

func newLegacyTables() legacyTables {
	l := legacyTables{known: map[string]*legacyTable{}, seed: maphash.MakeSeed()}
	for _, f := range legacyFamilies {
		l.families = append(l.families, legacyTablesOf{legacyFamily: f, names: f.namesFile(), fd: -1})
	}
	return l
}

// open opens in the calling thread's namespace what was not there before.
func (l *legacyTables) open() {
	for i := range l.families {
		f := &l.families[i]
		f.names.open()
		if f.names.fd >= 0 && f.fd < 0 {
			f.fd, f.names.err = f.socket()
		}
	}
}

func (l *legacyTables) close() {
	for i := range l.families {
		l.families[i].names.close()
		if l.families[i].fd >= 0 {
			_ = unix.Close(l.families[i].fd)
			l.families[i].fd = -1
		}
	}
}

// possible tells whether the kernel has what tables are made by.
func (l *legacyTables) possible() bool {
	return slices.ContainsFunc(l.families, func(f legacyTablesOf) bool { return f.names.fd >= 0 })
}

// changed looks at the tables, and tells whether they are others than the last
// time.
func (l *legacyTables) changed() bool {
	before := l.known
	l.known, l.why = map[string]*legacyTable{}, nil
	changed := false
	for i := range l.families {
		seen, err := l.look(&l.families[i], before)
		if err != nil {
			l.why = append(l.why, fmt.Sprintf("%stables-legacy: %v", l.families[i].name, err))
		}
		changed = changed || seen
	}
	return changed || len(l.known) != len(before)
}

// look looks at the tables of a family, and tells whether one is new or another
// than before.
func (l *legacyTables) look(f *legacyTablesOf, before map[string]*legacyTable) (changed bool, err error) {
	names, err := tableNames(&f.names)
	for _, name := range names {
		key := f.name + " " + name
		now, lookErr := l.lookAt(f, name, before[key])
		if lookErr != nil {
			err = lookErr
			continue
		}
		l.known[key] = &now
		was := before[key]
		changed = changed || was == nil || was.info != now.info || was.sum != now.sum
	}
	return changed, err
}

// lookAt looks at a table: at its entries if its size has changed, or if that
// has not been done for some time.
func (l *legacyTables) lookAt(f *legacyTablesOf, name string, was *legacyTable) (now legacyTable, err error) {
	info, err := f.info(f.fd, name)
	if err != nil {
		return now, err
	}
	if was != nil && was.info == info && !was.due(time.Now()) {
		return *was, nil
	}
	now = legacyTable{info: info, read: time.Now()}
	var entries []byte
	if l.buf, entries, err = f.entries(f.fd, name, info.size, l.buf); errors.Is(err, unix.EAGAIN) {
		return now, nil // its size changed between; another it is
	} else if err != nil {
		return now, err
	}
	f.entry.clearCounters(entries)
	now.sum = maphash.Bytes(l.seed, entries)
	now.took = time.Since(now.read)
	return now, nil
}

// ebtablesModules are the tables of ebtables-legacy, a module each.
var ebtablesModules = []string{"ebtable_broute", "ebtable_filter", "ebtable_nat"}

// ebtablesLegacy lists the tables of ebtables-legacy that may be there. To ask
// for one would make it.
func ebtablesLegacy() []string {
	var reasons []string
	for _, module := range ebtablesModules {
		if _, err := os.Stat(filepath.Join(sysModules, module)); err == nil {
			reasons = append(reasons, "ebtables-legacy: "+module+" is loaded, and to read its table would make it")
		}
	}
	return reasons
}

// fixedString is a text in the fixed room that it has in a struct.
func fixedString(b []byte) string {
	text, _, _ := bytes.Cut(b, []byte{0})
	return string(text)
}
