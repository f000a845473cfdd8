//go:build linux

package netns

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// Cards are network cards of the machine that tests may use: WEFT_CARDS names them,
// separated by commas, each two of them cabled to each other.
func Cards() []string {
	return strings.FieldsFunc(os.Getenv("WEFT_CARDS"), func(r rune) bool { return r == ',' })
}

// taken are the cards that a test has.
var taken struct {
	sync.Mutex
	cards map[string]bool
}

// takeCards returns two cards that are cabled to each other and that no test has, or
// none.
func takeCards() (pair []string) {
	taken.Lock()
	defer taken.Unlock()
	if taken.cards == nil {
		taken.cards = map[string]bool{}
	}
	for all := Cards(); len(all) >= 2; all = all[2:] {
		if !taken.cards[all[0]] {
			taken.cards[all[0]] = true
			return all[:2]
		}
	}
	return nil
}

// Cable is Connect by two cards, where there are some; until the test ends they are
// in the namespaces. What a test sets of them (MAC addresses, offloads) stays.
func Cable(tb testing.TB, a *NS, nameA string, b *NS, nameB string) {
	tb.Helper()
	pair := takeCards()
	if pair == nil {
		if len(Cards()) > 0 {
			tb.Fatalf("the test needs more cards than WEFT_CARDS names: %s", Cards())
		}
		Connect(tb, a, nameA, b, nameB)
		return
	}
	tb.Cleanup(func() { // when both are back
		taken.Lock()
		defer taken.Unlock()
		taken.cards[pair[0]] = false
	})
	for i, end := range []struct {
		ns   *NS
		name string
	}{{a, nameA}, {b, nameB}} {
		if err := MoveCard("", pair[i], end.ns.Path(), end.name); err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() {
			if err := MoveCard(end.ns.Path(), end.name, Here(), pair[i]); err != nil {
				tb.Error(err)
			}
		})
		end.ns.Run(tb, "ip link set "+end.name+" up")
	}
}

// MoveCard moves a device to another namespace, where it is down and has another
// name. A namespace is said by a path, the caller's own also by an empty one.
func MoveCard(from, name, to, newName string) error {
	var enter []string
	if from != "" {
		enter = []string{"nsenter", "--net=" + from}
	}
	for _, line := range [][]string{
		{"ip", "link", "set", "dev", name, "down"},
		{"ip", "link", "set", "dev", name, "netns", to, "name", newName},
	} {
		command := append(enter, line...)
		if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("moving %s to %s as %s: %w\n%s", name, to, newName, err, out)
		}
	}
	return nil
}

// Here is the path of the namespace that the calling thread is in.
func Here() string { return fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid()) }
