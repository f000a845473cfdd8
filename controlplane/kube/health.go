package kube

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"sync"
	"time"
)

// Away says that the API does not do what it is asked: it can't be reached, or
// refuses.
type Away struct {
	// Host is the API server's URL.
	Host string
	// Since is when that began.
	Since time.Time
	// Err is what it, or the network, said last.
	Err error
}

// Error implements error. As long as the API says the same, the text is the
// same.
func (a *Away) Error() string {
	return fmt.Sprintf("the Kubernetes API %s has not answered well since %s: %s", a.Host, a.Since.UTC().Format(time.RFC3339), plain(a.Err))
}

// Unwrap gives what was said.
func (a *Away) Unwrap() error { return a.Err }

// plain is the text of what a client of the API returns, without what changes
// from one try to the next: the request's parameters and our port.
func plain(err error) string {
	var request *url.Error
	if errors.As(err, &request) {
		err = request.Err
	}
	var network *net.OpError
	if errors.As(err, &network) && network.Addr != nil {
		return fmt.Sprintf("%s %s %s: %v", network.Op, network.Net, network.Addr, network.Err)
	}
	return short(err)
}

// answers notes how the API answers.
type answers struct {
	host string
	// nudge is called when that changed.
	nudge func()

	mu   sync.Mutex
	away *Away
}

// Note takes one answer.
func (a *answers) Note(err error) {
	now := time.Now()
	a.mu.Lock()
	before := a.away
	switch {
	case err == nil:
		a.away = nil
	case before == nil:
		a.away = &Away{Host: a.host, Since: now, Err: err}
	default:
		a.away = &Away{Host: a.host, Since: before.Since, Err: err}
	}
	changed := (before == nil) != (a.away == nil) || before != nil && before.Error() != a.away.Error()
	a.mu.Unlock()
	if changed {
		a.nudge()
	}
}

// Away is nil when the last answer was good.
func (a *answers) Away() *Away {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.away
}

// oneLine is an error's text without line breaks.
func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }
