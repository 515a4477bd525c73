using System.Net;
using System.Security.Cryptography;
using System.Text;
using Microsoft.AspNetCore.Builder;
using Microsoft.AspNetCore.Hosting;
using Microsoft.AspNetCore.Http;
using Microsoft.AspNetCore.Http.Features;
using Microsoft.Extensions.DependencyInjection;
using Microsoft.Extensions.Hosting;
using Microsoft.Extensions.Logging;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Data.Text;
using MiniCpmNative.Engine.Generate;

namespace MiniCpmNative.Cli.Serve;

/// <summary>How a model is served.</summary>
internal sealed record ServeOptions
{
    public IPAddress Host { get; init; } = IPAddress.Loopback;

    /// <summary>0 takes any that is free.</summary>
    public int Port { get; init; } = 8080;

    /// <summary>What a request must carry as "Authorization: Bearer KEY"; null asks for
    /// none.</summary>
    public string? Key { get; init; }

    public int MostWaiting { get; init; } = 64;

    public int Batch { get; init; } = 8;

    public long MostBytes { get; init; } = 32 << 20;
}

/// <summary>
/// A model behind OpenAI's /v1/models and /v1/chat/completions, and a page at / that asks it. The
/// adapter's answers are those of the model NAME, NAME:base is the model without it.
/// </summary>
internal sealed class ChatServer : IAsyncDisposable
{
    private const string Base = ":base", Wrong = "invalid_request_error";

    private readonly ServeOptions _options;
    private readonly AskedModel _model;
    private readonly string _name;
    private readonly GenerationSettings _settings;
    private readonly PromptMaker _maker;
    private readonly AnswerQueue _queue;
    private readonly WebApplication _app;
    private readonly Action<string> _say;
    private readonly long _started = DateTimeOffset.UtcNow.ToUnixTimeSeconds();

    // Reading pictures takes processors and memory, which the answers want too.
    private readonly SemaphoreSlim _reading = new(Environment.ProcessorCount);

    /// <param name="options">Where and for whom.</param>
    /// <param name="name">The model's name in requests.</param>
    /// <param name="model">Is the server's until it ends.</param>
    /// <param name="settings">What holds where a request says nothing.</param>
    /// <param name="maker">Makes the prompts.</param>
    /// <param name="say">Takes a line per answer.</param>
    public ChatServer(ServeOptions options, string name, AskedModel model,
        GenerationSettings settings, PromptMaker maker, Action<string> say)
    {
        (_options, _name, _model, _settings, _maker, _say) =
            (options, name, model, settings, maker, say);
        _queue = new AnswerQueue(model, options.Batch, options.MostWaiting);
        WebApplicationBuilder builder = WebApplication.CreateEmptyBuilder(new());
        builder.Logging.ClearProviders();
        builder.Services.AddSingleton<IHostLifetime, NoLifetime>();
        builder.Services.Configure<HostOptions>(
            host => host.ShutdownTimeout = Timeout.InfiniteTimeSpan);
        builder.Services.AddRoutingCore();
        builder.WebHost.UseKestrelCore().ConfigureKestrel(kestrel =>
        {
            kestrel.Listen(options.Host, options.Port);
            kestrel.AddServerHeader = false;
            kestrel.Limits.MaxRequestBodySize = options.MostBytes;
            kestrel.Limits.MaxConcurrentConnections = 1024;
        });
        _app = builder.Build();
        _app.Use(Guard);
        _app.MapGet("/", Page);
        _app.MapGet("/v1/models", context => Send(
            context, 200, ChatReply.Models(Names, _started)));
        _app.MapPost("/v1/chat/completions", Complete);
        _app.MapFallback(context => Refuse(
            context, 404, $"there is no {context.Request.Method} {context.Request.Path}"));
    }

    /// <summary>Where it listens; known once it has started.</summary>
    public string Address => _app.Urls.First();

    private string[] Names => _model.Adapter is null ? [_name] : [_name, _name + Base];

    /// <exception cref="InputException">The port cannot be had.</exception>
    public async Task Start()
    {
        try
        {
            await _app.StartAsync();
        }
        catch (IOException taken)
        {
            throw new InputException(
                $"port {_options.Port} on {_options.Host} cannot be had: "
                + $"{Messages.OneLine(taken.Message)}; --port takes another", taken);
        }
    }

    /// <summary>Takes no more requests, tells those that wait, and waits for those that
    /// run.</summary>
    public async Task Stop()
    {
        _queue.Close();
        await _app.StopAsync(CancellationToken.None);
    }

    public async ValueTask DisposeAsync()
    {
        await _app.DisposeAsync();
        _queue.Dispose();
        _reading.Dispose();
    }

    // Pages of other sites, which a browser here may show, must not reach a server that asks for no
    // key: they cannot send JSON without being asked for, nor name this host.
    private async Task Guard(HttpContext context, RequestDelegate next)
    {
        bool isPage = context.Request.Path == "/";
        string host = context.Request.Host.Host.Trim('[', ']');
        if (_options.Key is null && IPAddress.IsLoopback(_options.Host) && host != "localhost"
            && !(IPAddress.TryParse(host, out var address) && IPAddress.IsLoopback(address)))
            await Refuse(context, 403, "asked for under a name that is not this machine's own");
        else if (_options.Key is not null && !isPage && !HasKey(context.Request))
            await Refuse(context, 401, "the API key is missing or another one");
        else await next(context);
    }

    private bool HasKey(HttpRequest request)
    {
        string given = request.Headers.Authorization.ToString();
        return given.StartsWith("Bearer ", StringComparison.OrdinalIgnoreCase)
            && CryptographicOperations.FixedTimeEquals(
                Encoding.UTF8.GetBytes(given["Bearer ".Length..].Trim()),
                Encoding.UTF8.GetBytes(_options.Key!));
    }

    private static Task Page(HttpContext context)
    {
        context.Response.ContentType = "text/html; charset=utf-8";
        context.Response.Headers.ContentSecurityPolicy =
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
            + "img-src data: blob:; connect-src 'self'";
        return context.Response.SendBytes(ServePage.Content);
    }

    private async Task Complete(HttpContext context)
    {
        long began = Environment.TickCount64;
        AnswerJob job;
        try
        {
            if (!context.Request.HasJsonContentType())
                throw new InputException("the request is no JSON: Content-Type is "
                    + $"{Messages.Quote(context.Request.ContentType ?? "")}");
            job = await Job(await Body(context), context.RequestAborted);
        }
        catch (InputException problem)
        {
            await Refuse(context, 400, problem.Message);
            return;
        }
        catch (OperationCanceledException)
        {
            return; // nobody waits
        }
        catch (BadHttpRequestException problem)
        {
            await Refuse(context, problem.StatusCode, problem.StatusCode == 413
                ? $"the request has more than {_options.MostBytes:N0} bytes" : problem.Message);
            return;
        }

        if (!_queue.TryAdd(job))
        {
            context.Response.Headers.RetryAfter = "5";
            await Refuse(context, 429, $"{_options.MostWaiting} requests wait already");
            return;
        }

        string name = job.Adapted || _model.Adapter is null ? _name : _name + Base;
        string how = await (job.Request.Streams ? Stream(context, job, name) : Whole(context, job, name));
        int videos = job.Request.Media.Videos.Count;
        _say(FormattableString.Invariant($"{name}: {job.Request.Media.Pictures.Count} pictures, ")
            + (videos > 0 ? FormattableString.Invariant($"{videos} videos, ") : "")
            + FormattableString.Invariant($"{job.Input.Tokens:N0} + {job.Tokens:N0} tokens, ")
            + FormattableString.Invariant(
                $"{(Environment.TickCount64 - began) / 1e3:0.0} s{how}"));
    }

    private static async Task<ReadOnlyMemory<byte>> Body(HttpContext context)
    {
        using var body = new MemoryStream();
        await context.Request.Body.CopyToAsync(body, context.RequestAborted);
        return body.GetBuffer().AsMemory(0, (int)body.Length);
    }

    private bool IsAdapted(string name) =>
        name.Length == 0 || name == _name ? _model.Adapter is not null
            : name == _name + Base && _model.Adapter is not null ? false
            : throw new InputException($"the request: there is no model {Messages.Quote(name)}, "
                + $"expected {string.Join(" or ", Names)}");

    private async Task<AnswerJob> Job(ReadOnlyMemory<byte> body, CancellationToken gone)
    {
        await _reading.WaitAsync(gone);
        try
        {
            ChatRequest request = ChatRequest.Read(body, _settings);
            bool adapted = IsAdapted(request.Model);
            PromptFormat format = _model.Rows.Prompts;
            if (request.HasFunctions && format.Tools is null)
                throw new InputException("the request: has functions (tools, tool_calls or turns of "
                    + "role tool), which the chat template of this model "
                    + $"({_model.Model.Spec.Family}) does not have");
            GenerationInput input = _maker.Make(
                request.Turns,
                [.. request.Media.Pictures.Select((picture, i) =>
                    _maker.Open(picture, $"picture {i + 1}"))],
                request.System, request.Thinks,
                request.Seed ?? (ulong)Random.Shared.NextInt64(),
                [.. request.Media.Sounds.Select((sound, i) =>
                    _maker.Hear(sound, $"sound {i + 1}"))],
                [.. request.Media.Videos.Select((video, i) =>
                    _maker.Watch(video, $"video {i + 1}"))],
                request.Tools, request.Begun(format));
            int most = Math.Min(
                request.MaxTokens ?? int.MaxValue, request.Settings.MaxNewTokens);
            return new AnswerJob(input, request, adapted, most, gone);
        }
        finally
        {
            _reading.Release();
        }
    }

    private static async Task<string> Whole(HttpContext context, AnswerJob job, string model)
    {
        var text = new StringBuilder();
        try
        {
            await foreach (string piece in job.Pieces.ReadAllAsync(context.RequestAborted))
                text.Append(piece);
        }
        catch (Exception failure) when (failure is not OperationCanceledException)
        {
            await Refuse(context, Status(failure), Messages.OneLine(failure.Message));
            return ": " + Messages.OneLine(failure.Message);
        }
        catch (OperationCanceledException)
        {
            return ": nobody waited";
        }

        await Send(context, 200, new ChatReply(model).Whole(
            text.ToString(), job.Calls, job.Finish, job.Input.Tokens, job.Tokens));
        return "";
    }

    private static async Task<string> Stream(HttpContext context, AnswerJob job, string model)
    {
        var reply = new ChatReply(model);
        context.Response.ContentType = "text/event-stream";
        context.Response.Headers.CacheControl = "no-cache";
        context.Features.Get<IHttpResponseBodyFeature>()?.DisableBuffering();
        try
        {
            await Event(reply.Chunk("", null, first: true));
            await foreach (string piece in job.Pieces.ReadAllAsync(context.RequestAborted))
                await Event(reply.Chunk(piece, null, first: false));
            if (job.Calls.Count > 0)
                await Event(reply.Chunk(null, null, first: false, job.Calls));
            await Event(reply.Chunk(null, job.Finish, first: false));
            if (job.Request.ReportsUsage)
                await Event(reply.UsageChunk(job.Input.Tokens, job.Tokens));
            await Event("[DONE]\n"u8.ToArray());
            return "";
        }
        catch (Exception failure) when (failure is OperationCanceledException or IOException)
        {
            return ": nobody waited";
        }
        catch (Exception failure)
        {
            string line = Messages.OneLine(failure.Message);
            await Event(ChatReply.Error(line, "server_error"));
            return ": " + line;
        }

        async Task Event(byte[] json)
        {
            await context.Response.Body.WriteAsync(
                (byte[])[.. "data: "u8, .. json, .. "\n"u8], context.RequestAborted);
            await context.Response.Body.FlushAsync(context.RequestAborted);
        }
    }

    private static int Status(Exception failure) => failure switch
    {
        InputException => 400,
        RunException => 503,
        _ => 500,
    };

    private static Task Refuse(HttpContext context, int status, string message) =>
        Send(context, status, ChatReply.Error(message, status >= 500 ? "server_error" : Wrong));

    private static async Task Send(HttpContext context, int status, byte[] json)
    {
        context.Response.StatusCode = status;
        context.Response.ContentType = "application/json";
        await context.Response.SendBytes(json);
    }

    // Signals are the command's.
    private sealed class NoLifetime : IHostLifetime
    {
        public Task WaitForStartAsync(CancellationToken cancellation) => Task.CompletedTask;

        public Task StopAsync(CancellationToken cancellation) => Task.CompletedTask;
    }
}
