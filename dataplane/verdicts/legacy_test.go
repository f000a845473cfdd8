//go:build linux

package verdicts

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestLegacyTablesAreSeen(t *testing.T) {
	n := newNode(t)
	w := n.mustOpen(t, Options{})
	for _, run := range []string{
		"iptables-legacy -A FORWARD -s 10.0.0.1 -j DROP", // and makes the table
		"iptables-legacy -R FORWARD 1 -s 10.0.0.2 -j DROP",
		"iptables-legacy -P FORWARD DROP",
		"iptables-legacy -N X",
		"iptables-legacy -E X Y",
		"iptables-legacy -t nat -A POSTROUTING -j MASQUERADE",
		"iptables-legacy -t raw -A PREROUTING -j NOTRACK",
		"ip6tables-legacy -A FORWARD -s fd00::1 -j DROP",
		"ip6tables-legacy -R FORWARD 1 -s fd00::2 -j DROP",
		"iptables-legacy -F",
	} {
		mustRest(t, w)
		n.Run(t, run)
		if changes, err := w.Wait(t.Context(), soon); changes != Iptables || err != nil {
			t.Errorf("%s: seen: %v, error %v", run, changes, err)
		}
	}
	if blind := w.Blind(); len(blind) > 0 {
		t.Errorf("blind: %q", blind)
	}
}

// Counters, and what matches keep for themselves, change with every packet.
func TestPacketsDontChangeLegacyTables(t *testing.T) {
	n := newNode(t)
	n.MustDo(t, func() error {
		return feed("iptables-legacy-restore", `*filter
-A OUTPUT -m limit --limit 5/s
-A OUTPUT -m quota --quota 100000
-A OUTPUT -m hashlimit --hashlimit-above 1/s --hashlimit-name x
-A OUTPUT -m statistic --mode nth --every 3 --packet 0
-A OUTPUT -m connbytes --connbytes 1000: --connbytes-mode bytes --connbytes-dir both
-A OUTPUT -m recent --set
-A OUTPUT -m comment --comment "a comment"
COMMIT
`)
	})
	w := n.mustOpen(t, Options{})
	n.Run(t, "ping -c 30 -i 0.01 127.0.0.1")
	mustSeeNothing(t, w, 3*pollInterval)
	if rules := n.Run(t, "iptables-legacy -L OUTPUT -vnx"); !strings.Contains(rules, " 60 ") {
		t.Errorf("no packets were counted:\n%s", rules)
	}
}

// mustOpenTables opens the tables of the calling thread's namespace.
func mustOpenTables(t *testing.T) *legacyTables {
	l := newLegacyTables()
	t.Cleanup(l.close)
	l.open()
	return &l
}

// Tables are never made by looking.
func TestTablesAreNotMade(t *testing.T) {
	n := newNode(t)
	n.Run(t, "iptables-legacy -t mangle -A FORWARD -j DROP")
	w := n.mustOpen(t, Options{})
	mustSeeNothing(t, w, 2*pollInterval)
	n.MustDo(t, func() error {
		if _, err := PerPacketRules(); err != nil {
			return err
		}
		l := mustOpenTables(t)
		names, err := tableNames(&l.families[0].names)
		if fmt.Sprint(names) != "[mangle]" {
			t.Errorf("tables: %q", names)
		}
		return err
	})
}

// Many rules are read seldom, for a hundredth of a processor's time; but their
// number is looked at each time.
func TestLargeTablesAreReadSeldom(t *testing.T) {
	now := time.Now()
	for took, due := range map[time.Duration]time.Duration{
		10 * time.Microsecond: time.Millisecond,
		4 * time.Millisecond:  400 * time.Millisecond,
		time.Minute:           entriesAtLeast,
	} {
		table := legacyTable{read: now, took: took}
		if table.due(now.Add(due-time.Microsecond)) || !table.due(now.Add(due)) {
			t.Errorf("a table that took %v is not due after %v", took, due)
		}
	}

	n := newNode(t)
	n.Run(t, "iptables-legacy -A FORWARD -s 10.0.0.1 -j DROP")
	n.MustDo(t, func() error {
		l := mustOpenTables(t)
		l.changed()
		l.known["ip filter"].took = time.Minute
		if err := feed("iptables-legacy -R FORWARD 1 -s 10.0.0.2 -j DROP", ""); err != nil {
			return err
		}
		if l.changed() {
			t.Error("the entries were read")
		}
		if err := feed("iptables-legacy -A FORWARD -s 10.0.0.2 -j DROP", ""); err != nil {
			return err
		}
		if !l.changed() {
			t.Error("another number of entries was not seen")
		}
		return nil
	})
}

// withoutNetAdmin takes the capability from the calling thread, for good.
func withoutNetAdmin() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return err
	}
	data[0].Effective &^= 1 << unix.CAP_NET_ADMIN
	return unix.Capset(&header, &data[0])
}

func TestTablesThatMayNotBeRead(t *testing.T) {
	n := newNode(t)
	n.Run(t, "iptables-legacy -t mangle -A FORWARD -j DROP")
	n.MustDo(t, func() error {
		if err := withoutNetAdmin(); err != nil {
			return err
		}
		l := mustOpenTables(t)
		for range 2 {
			if l.changed() {
				t.Error("what can't be read has changed")
			}
		}
		if want := "[iptables-legacy: asking for table mangle: operation not permitted]"; fmt.Sprint(l.why) != want {
			t.Errorf("refused: %q, want %s", l.why, want)
		}
		if _, err := Open(Options{}); !errors.Is(err, unix.EPERM) {
			t.Errorf("opened without CAP_NET_ADMIN: %v", err)
		}
		if _, err := PerPacketRules(); !errors.Is(err, unix.EPERM) {
			t.Errorf("rules that were not read are said to be clean: %v", err)
		}
		return nil
	})
}

func TestTableListThatCantBeRead(t *testing.T) {
	l := newLegacyTables()
	l.families = l.families[:1]
	l.families[0].names.err = unix.EACCES
	if l.changed() || len(l.why) != 1 || !strings.HasPrefix(l.why[0], "iptables-legacy: listing tables: ") {
		t.Errorf("refused: %q", l.why)
	}
}

func TestEbtablesLegacyIsNamed(t *testing.T) {
	before := sysModules
	t.Cleanup(func() { sysModules = before })
	sysModules = t.TempDir()
	if reasons := ebtablesLegacy(); len(reasons) != 0 {
		t.Errorf("blind: %q", reasons)
	}
	if err := os.Mkdir(filepath.Join(sysModules, "ebtable_filter"), 0o700); err != nil {
		t.Fatal(err)
	}
	if reasons := ebtablesLegacy(); len(reasons) != 1 || !strings.Contains(reasons[0], "ebtable_filter") {
		t.Errorf("blind: %q", reasons)
	}
}

// legacyRules are rules as kube-proxy has them in its filter table.
func legacyRules(count int) string {
	var b strings.Builder
	b.WriteString("*filter\n:KUBE-SERVICES - [0:0]\n")
	for i := range count {
		fmt.Fprintf(&b, "-A KUBE-SERVICES -d 10.96.%d.%d/32 -p tcp -m comment --comment \"ns/service-%d has no endpoints\" -m tcp --dport 80 -j REJECT\n", i>>8, i&255, i)
	}
	b.WriteString("COMMIT\n")
	return b.String()
}

// BenchmarkPoll is what a look at everything that sends no event costs, with
// many rules: at their number, or at themselves.
func BenchmarkPoll(b *testing.B) {
	for _, count := range []int{0, 100, 5000} {
		n := newNode(b)
		if count > 0 {
			n.MustDo(b, func() error { return feed("iptables-legacy-restore", legacyRules(count)) })
		}
		w := n.mustOpen(b, Options{Poll: time.Hour})
		for _, what := range []struct {
			name string
			took time.Duration
		}{{"Number", time.Hour}, {"Entries", 0}} {
			b.Run(fmt.Sprintf("%s/%d", what.name, count), func(b *testing.B) {
				for b.Loop() {
					for _, table := range w.tables.known {
						table.took = what.took
					}
					if _, err := w.poll(); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
