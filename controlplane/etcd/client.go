package etcd

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/status"
)

// maxAnswer bounds an answer of etcd, in bytes: the leases of 200,000 nodes.
const maxAnswer = 64 << 20

// connect makes a client. If etcd asks for a password it is given at once;
// otherwise the connection is made with the first request.
func (s *Store) connect(ctx context.Context) (*clientv3.Client, error) {
	client, err := clientv3.New(clientv3.Config{
		Context:              ctx,
		Endpoints:            s.options.Endpoints,
		TLS:                  s.tls,
		Username:             s.options.Username,
		Password:             s.options.Password,
		DialTimeout:          s.timing.Answer,
		DialKeepAliveTime:    s.timing.KeepAlive,
		DialKeepAliveTimeout: s.timing.Answer,
		MaxCallRecvMsgSize:   maxAnswer,
		// Once more for a token that has expired, and once for a member that
		// has gone; the rest is ours, with a gap that grows.
		MaxUnaryRetries: 3,
		Logger:          zap.NewNop(), // what goes wrong comes back as an error
		DialOptions: []grpc.DialOption{
			grpc.WithConnectParams(grpc.ConnectParams{
				Backoff:           backoff.Config{BaseDelay: s.timing.RetryMin, Multiplier: 1.6, Jitter: 0.3, MaxDelay: s.timing.RetryMax},
				MinConnectTimeout: s.timing.Answer,
			}),
			grpc.WithChainUnaryInterceptor(failFast),
		},
	})
	if err != nil {
		return nil, s.explain("connecting to etcd", err)
	}
	return client, nil
}

// failFast has a request fail with the reason why there is no connection, where
// the client would wait for one until its time is over.
func failFast(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	return invoke(ctx, method, req, reply, cc, append(slices.Clip(opts), grpc.WaitForReady(false))...)
}

// explain says what was being done when err came, and what to do about it. One
// cause has one text, however often it comes.
func (s *Store) explain(doing string, err error) error {
	o := s.options
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%s: no answer from %s in time", doing, strings.Join(o.Endpoints, ", "))
	case errors.Is(err, rpctypes.ErrAuthFailed):
		return fmt.Errorf("%s: etcd does not know user %q with the password given; correct --etcd-username and --etcd-password: %w", doing, o.Username, err)
	case errors.Is(err, rpctypes.ErrUserEmpty):
		return fmt.Errorf("%s: etcd asks for a user; give --etcd-username and --etcd-password: %w", doing, err)
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		return fmt.Errorf("%s: user %q may not do this; grant read for %s and readwrite for the prefix %s: %w", doing, o.Username, s.configKey, s.directory, err)
	}
	if _, ok := status.FromError(err); !ok {
		return fmt.Errorf("%s: %w", doing, err)
	}
	text := plain(err)
	hint := ""
	if s.config == nil { // it has never worked
		hint = o.hint(text)
	}
	return fmt.Errorf("%s at %s: %s%s", doing, strings.Join(o.Endpoints, ", "), text, hint)
}

// hint says what a failed handshake is most likely about.
func (o Options) hint(text string) string {
	switch {
	case strings.Contains(text, "x509:") && o.CAFile == "":
		return "; give --etcd-cafile if its certificate is not signed by one of the system's authorities"
	case strings.Contains(text, "x509:"):
		return fmt.Sprintf("; see --etcd-cafile, %s, and the names in etcd's certificate", o.CAFile)
	case strings.Contains(text, "remote error: tls:") && o.CertFile == "":
		return "; etcd asks for a certificate: give --etcd-certfile and --etcd-keyfile"
	case strings.Contains(text, "remote error: tls:"):
		return fmt.Sprintf("; etcd does not accept the certificate in --etcd-certfile, %s", o.CertFile)
	case o.secure() && (text == "EOF" || strings.Contains(text, "first record does not look like a TLS handshake")):
		return "; if it does not speak TLS there, give http endpoints"
	case !o.secure() && strings.Contains(text, "error reading server preface"):
		return "; if it speaks TLS there, give https endpoints"
	}
	return ""
}

// localPort finds our own end of a connection in an error, which is another one
// every time.
var localPort = regexp.MustCompile(`(read|write) tcp \S+->`)

// ended finds what a connection that etcd ends is called, depending on the moment.
var ended = regexp.MustCompile(`^(read|write) tcp \S+ .*(broken pipe|connection reset by peer)$`)

// noPreface is how gRPC puts it that a connection was made and nothing came.
var noPreface = regexp.MustCompile(`^error reading server preface: .*use of closed network connection$`)

// plain takes gRPC's wrappings off an error.
func plain(err error) string {
	text := status.Convert(err).Message()
	for {
		before := text
		for _, wrapping := range []string{"last connection error: ", "connection error: desc = ", "transport: ", "Error while dialing: ", "authentication handshake failed: "} {
			text = strings.TrimPrefix(text, wrapping)
		}
		if inner, err := strconv.Unquote(text); err == nil {
			text = inner
		}
		if noPreface.MatchString(text) {
			return "it takes connections and does not answer"
		}
		if text == before {
			return ended.ReplaceAllString(localPort.ReplaceAllString(text, "$1 tcp "), "it ends the connection")
		}
	}
}

// sleep waits, or returns false because ctx is done.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
