using System.Text;
using System.Text.Json;
using System.Text.Json.Nodes;
using MiniCpmNative.Cli.Serve;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Generate;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>Sounds in requests to a server whose model hears.</summary>
[TestFixture]
public sealed class ServeSoundTests
{
    [Test]
    public async Task ARequestsSoundIsHeardAsAConversations()
    {
        string folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;
        string path = Path.Combine(folder, "a.wav");
        try
        {
            AudioModel.Write(folder);
            File.WriteAllBytes(path, AudioModel.Wav(16000));
            using AskedModel model = AskedModel.Open(new TrainArguments
            {
                ModelNameOrPath = folder,
                Device = DeviceChoice.Cpu,
                InitAudio = true,
            }, null);
            var settings = new GenerationSettings
            {
                MaxNewTokens = 12,
                StopIds = model.Rows.Prompts.StopIds,
                RepetitionPenalty = 1.05,
            };
            var maker = new PromptMaker(model.Model.Spec, model.Rows);
            var session = new ChatSession(model, maker, settings);
            session.Hear(path);
            string expected = session.Ask("What?", _ => { }, () => true).Text;
            await using var server =
                new ChatServer(new ServeOptions { Port = 0 }, "o", model, settings, maker,
                    _ => { });
            await server.Start();
            string wav = Convert.ToBase64String(File.ReadAllBytes(path)),
                other = Convert.ToBase64String(AudioModel.Wav(22000, seed: 2));
            // As OpenAI has it, and as other servers do.
            Assert.That(await Ask(server, new JsonObject
            {
                ["type"] = "input_audio",
                ["input_audio"] = new JsonObject { ["data"] = wav, ["format"] = "wav" },
            }), Is.EqualTo(expected));
            Assert.That(await Ask(server, Url("data:audio/wav;base64," + wav)),
                Is.EqualTo(expected));
            Assert.That(
                await Ask(server, Url("data:audio/wav;base64," + other)), Is.Not.EqualTo(expected));
            Assert.That(await Ask(server, Url("data:audio/wav;base64,AAAA")),
                Does.Contain("sound 1: is no sound file"));
            Assert.That(await Ask(server, Url("http://example.com/a.wav")),
                Does.Contain("nothing is fetched"));
            await server.Stop();
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }

        static JsonObject Url(string url) => new()
        {
            ["type"] = "audio_url",
            ["audio_url"] = new JsonObject { ["url"] = url },
        };
    }

    // The answer, or what is said in its place.
    private static async Task<string> Ask(ChatServer server, JsonObject sound)
    {
        var body = new JsonObject
        {
            ["messages"] = new JsonArray(new JsonObject
            {
                ["role"] = "user",
                ["content"] = new JsonArray(
                    sound, new JsonObject { ["type"] = "text", ["text"] = "What?" }),
            }),
        };
        using var client = new HttpClient();
        using HttpResponseMessage reply = await client.PostAsync(
            server.Address + ServedModel.Completions,
            new StringContent(body.ToJsonString(), Encoding.UTF8, "application/json"));
        using JsonDocument json = JsonDocument.Parse(await reply.Content.ReadAsStringAsync());
        return json.RootElement.TryGetProperty("error", out JsonElement error)
            ? error.GetProperty("message").GetString()!
            : json.RootElement.GetProperty("choices")[0].GetProperty("message")
                .GetProperty("content").GetString()!;
    }
}
